"""The life of a request: its attempts, their commands, its output and its times."""
