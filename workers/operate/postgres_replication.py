"""Warnings of `headrace check` about PostgreSQL settings with which an applied delivery could be lost."""

from sqlalchemy import make_url, text

from app.config.settings import Settings
from app.errors import TryLater
from workers.store.engine import make_engine, transaction

SETTINGS = text("SELECT current_setting('synchronous_commit'), current_setting('synchronous_standby_names')")


def warnings(settings: Settings) -> list[str]:
    """One text per setting. Empty if the database cannot be reached, which another check reports.

    A worker acknowledges a message when its deliveries are committed: what PostgreSQL loses afterwards is not sent
    again. It can be restored from the archive of another copy only, or fetched from the aggregator.
    """
    engine = make_engine(settings, "headrace-check")
    try:
        with transaction(engine) as connection:
            commit, standbys = connection.execute(SETTINGS).one()
    except TryLater:
        return []
    finally:
        engine.dispose()
    if commit == "off":
        return ["synchronous_commit is off: a crash of PostgreSQL loses applied deliveries; set it to on"]
    if "," not in str(make_url(settings.need_database()).query.get("host", "")):
        return []
    loses = "the loss of the primary loses applied deliveries"
    if not standbys:
        return [f"synchronous_standby_names is empty: {loses}; name the standbys, or use Patroni's synchronous_mode"]
    return [f"synchronous_commit is local: {loses}; set it to on"] if commit == "local" else []
