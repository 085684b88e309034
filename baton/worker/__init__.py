"""What both roles of a worker share: the router's session, the engine's thread, load reports, handing over."""
