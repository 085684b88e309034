"""Composition: the roles as processes, alone or as a local cluster."""
