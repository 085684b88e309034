"""How far formats are from float32."""
