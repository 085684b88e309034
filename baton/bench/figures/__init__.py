"""The figures of a load, from its records."""
