"""Experiments as YAML; a package, so that an installed `fedkd` finds them."""
