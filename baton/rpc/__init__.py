"""gRPC as every process uses it: servers, channels, statuses, streams that survive a break."""
