"""The router: takes requests, places each on both pools, and streams the tokens back."""
