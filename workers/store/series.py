"""Series numbers: the integer that identifies (user, resource, provider, source type, subtype) in a sample row."""

from collections.abc import Iterable, Sequence

from sqlalchemy import Engine, text

from workers.actions import Action, Record, Samples, SeriesKey
from workers.store.engine import transaction
from workers.store.partitions import SampleMonths
from workers.store.sql import RowParameters
from workers.store.users import Claim, upsert_users

GIVEN = RowParameters("user_id text, resource text, provider text, source_type text, subtype text")
REGISTER = text(f"""
INSERT INTO headrace.series ({GIVEN.columns})
SELECT * FROM {GIVEN} ORDER BY {GIVEN.columns} ON CONFLICT DO NOTHING""")
LOOK_UP = text(f"SELECT id, {GIVEN.columns} FROM headrace.series JOIN {GIVEN} USING ({GIVEN.columns})")
MAX_CACHED = 200_000


class SeriesNumbers:
    """Looks up and registers series numbers. Caches them for the life of the process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[SeriesKey, int] = {}
        self._months = SampleMonths(engine)

    def prepare(self, aggregator: str, given: Sequence[Action]) -> dict[SeriesKey, int]:
        """As `of`, for the series of actions. Also creates the partitions of the months of their samples.

        Call it before the transaction that writes the actions.
        """
        self._months.ensure(one for one in given if isinstance(one, Samples))
        return self.of(aggregator, (key for one in given if isinstance(one, Record | Samples) for key in one.series))

    def of(self, aggregator: str, keys: Iterable[SeriesKey]) -> dict[SeriesKey, int]:
        """The number of each key. New series of users who were erased, or belong to another aggregator, have none.

        New numbers are committed in a transaction of their own: a cached number must never be rolled back.
        """
        wanted = set(keys)
        if missing := wanted - self._known.keys():
            if len(self._known) + len(missing) > MAX_CACHED:
                self._known.clear()
            self._register(aggregator, sorted(wanted - self._known.keys()))
        return {key: self._known[key] for key in wanted if key in self._known}

    def _register(self, aggregator: str, keys: list[SeriesKey]) -> None:
        with transaction(self._engine) as connection:
            rows = connection.execute(LOOK_UP, GIVEN.values(keys)).all()
            if len(rows) < len(keys):
                users = upsert_users(connection, dict.fromkeys(Claim(aggregator, key[0]) for key in keys))
                if writable := [key for key in keys if not users[Claim(aggregator, key[0])].is_read_only]:
                    connection.execute(REGISTER, GIVEN.values(writable))
                rows = connection.execute(LOOK_UP, GIVEN.values(keys)).all()
        self._known |= {
            (user_id, resource, provider, source_type, subtype): number
            for number, user_id, resource, provider, source_type, subtype in rows
        }
