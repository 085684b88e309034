"""What both roles of a worker share: router sessions, the engine's thread, load reports, sending blocks."""
