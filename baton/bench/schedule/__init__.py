"""The schedule of a load: its requests and their times."""
