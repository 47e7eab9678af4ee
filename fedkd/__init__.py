"""fedkd: distil many private teachers into one small student."""

__version__ = "0.1.0"
