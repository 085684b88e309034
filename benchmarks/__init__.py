"""The repository's benchmarks; each is a make target."""
