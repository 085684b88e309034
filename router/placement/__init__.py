"""Which workers serve a request: pure functions of a snapshot, without clock or I/O."""
