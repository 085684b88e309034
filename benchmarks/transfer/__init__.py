"""Moving KV blocks."""
