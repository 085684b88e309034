"""Sending a load and recording the answers."""
