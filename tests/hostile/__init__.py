"""What hostile clients do to others: attacks, and measurements of how others fare meanwhile."""
