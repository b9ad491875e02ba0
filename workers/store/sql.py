"""Quoting of SQL identifiers."""


def quoted(name: str) -> str:
    """A name of the catalogue as an SQL identifier; the catalogue has checked that it is a plain word."""
    return f'"{name}"'
