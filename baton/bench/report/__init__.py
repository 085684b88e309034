"""How a load's figures are shown."""
