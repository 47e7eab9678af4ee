"""Pages, figures, tables and number formats."""
