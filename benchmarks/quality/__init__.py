"""The divergence of formats from float32."""
