"""The decode role: takes sequences over and streams their tokens."""
