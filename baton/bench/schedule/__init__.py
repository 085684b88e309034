"""What a load sends, and when."""
