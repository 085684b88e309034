"""Moving KV blocks between workers: the pool, the protocol of a handoff, and the transports."""
