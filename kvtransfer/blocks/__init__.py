"""KV blocks: layout, pool, cached prefixes, memory."""
