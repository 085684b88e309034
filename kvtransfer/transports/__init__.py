"""Moving bytes: one seam, and a folder for each kind of transport."""
