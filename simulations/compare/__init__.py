"""Methods side by side on one split (`fedkd compare`), and grids of options (`fedkd ablate`)."""
