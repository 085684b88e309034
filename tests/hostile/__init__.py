"""What one request, one pause or one container does to a cluster: the cases of `make test-hostile`, with real times."""
