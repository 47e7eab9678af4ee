"""Pages, figures, tables and number formats."""

from fedkd.io.extras import extra

with extra("report", "fedkd.reporting"):
    import jinja2 as _jinja2  # noqa: F401
    import matplotlib as _matplotlib  # noqa: F401
