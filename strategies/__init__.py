"""The messages of a round over Flower; `fedkd` does the work."""
