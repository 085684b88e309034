"""The workers: registration, links, ledgers of placed work, cached prefixes."""
