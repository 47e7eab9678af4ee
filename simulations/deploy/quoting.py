"""Strings on Flower's command line."""


# Start scripts hold this source between single quotes: none in here.
def quoted(text: str) -> str:
    """A string as Flower reads it in `--run-config`, `--node-config` and its TOML.

    Flower looks for the next quotation mark and reads TOML afterwards, so whatever may be taken for
    an end is written as its number.
    """
    kept, mark = "/._-", chr(34)
    safe = (c if (c.isascii() and c.isalnum()) or c in kept else f"\\U{ord(c):08x}" for c in text)
    return mark + "".join(safe) + mark
