"""Digests of the stored rows of each view, by which two states are compared."""

from sqlalchemy import Engine, text

from app.catalogue import catalogue


def digests(engine: Engine) -> dict[str, str]:
    """A digest of what each view says, whatever the order of its rows; not of when and how a row came to be there."""
    found = {}
    with engine.connect() as connection:
        for name in catalogue():
            row = "to_jsonb(v) - 'stored_at' - 'origin'"
            digest = f"md5(coalesce(string_agg(md5(({row})::text), '' ORDER BY md5(({row})::text)), ''))"
            found[f"health.{name}"] = str(connection.scalar(text(f"SELECT {digest} FROM health.{name} v")))
    return found
