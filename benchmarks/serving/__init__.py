"""Whole clusters under load."""
