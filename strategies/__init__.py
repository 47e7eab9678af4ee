"""Flower strategies: they move the messages, `fedkd` does the work."""
