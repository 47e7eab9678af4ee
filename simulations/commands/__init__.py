"""The commands of `fedkd`, one module each; `simulations.cli` puts them together."""
