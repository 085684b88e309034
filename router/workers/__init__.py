"""The workers: registration, links, ledgers of what was placed, cached prefixes."""
