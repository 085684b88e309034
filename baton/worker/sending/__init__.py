"""The sending side of a handoff, for a role that holds blocks."""
