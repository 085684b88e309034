"""TCP between hosts, plain or under TLS."""
