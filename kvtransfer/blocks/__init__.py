"""KV blocks: their layout, the pool, cached prefixes, memory."""
