"""The edge to clients: the gRPC service, parsing, validation, and the events that are sent."""
