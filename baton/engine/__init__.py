"""Engines: one step computes both phases. `api` is the seam."""
