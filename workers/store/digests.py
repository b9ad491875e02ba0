"""Digests of the views, to compare two states of the stored data."""

from sqlalchemy import Engine, text

from app.catalogue import catalogue


def digests(engine: Engine) -> dict[str, str]:
    """A digest of each view's rows, independent of row order, `origin` and `stored_at`."""
    row = "to_jsonb(v) - 'stored_at' - 'origin'"
    digest = f"md5(coalesce(string_agg(md5(({row})::text), '' ORDER BY md5(({row})::text)), ''))"
    with engine.connect() as connection:
        return {
            f"health.{name}": str(connection.scalar(text(f"SELECT {digest} FROM health.{name} v")))
            for name in catalogue()
        }
