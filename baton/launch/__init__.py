"""Composition: what turns the roles into processes, alone or as a local cluster."""
