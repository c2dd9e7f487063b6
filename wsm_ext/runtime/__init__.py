"""A plan at work."""
