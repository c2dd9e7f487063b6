"""The command `wsm`, and what its parts print."""
