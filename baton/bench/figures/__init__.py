"""What the records of a load say."""
