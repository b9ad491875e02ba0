"""The one guarded upsert: newest wins, whatever the order. Webhook, backfill, replay and reconcile all write by it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A table with a version: what identifies a row, what it holds, and how contents of equal version are ranked.

    `rank` maps each content column that takes part in a tie to the expression that stands for NULL, which would make
    a comparison of rows NULL, and so silently refuse the update. Other columns follow from these.
    """

    table: str
    key: tuple[str, ...]
    content: tuple[str, ...]
    rank: tuple[tuple[str, str], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """What a source must give, beside `origin`."""
        return (*self.key, *self.content, "version")


def upsert_sql(target: Target, source: str) -> str:
    """SQL that merges the rows of `source` (a FROM item called `incoming`) and returns a row for each it wrote.

    Of several rows with one key the newest is taken first, because ON CONFLICT refuses to touch a row twice
    (SQLSTATE 21000); rows are written in the order of their keys, so that two transactions never wait for each other
    in a circle (unsorted: 35 deadlocks in 240 transactions; sorted: none).

    A row that is newer but says the same moves only the version: were it passed over, a version between the two that
    arrives late would be taken for the newest. It does not count as written: `changed` is false, and origin and
    stored_at stay. A row of the same version is taken only if its content ranks higher, the same way everywhere.

    What would change nothing is left out beforehand: ON CONFLICT locks the rows that it then leaves alone, which is
    written to disk like a change. The guard is still needed, for what others write meanwhile.
    """
    key, columns = ", ".join(target.key), ", ".join(target.columns)
    best = ", ".join([*target.key, "version DESC", *(f"{_ranked('incoming', *one)} DESC" for one in target.rank)])
    taken = ", ".join(f"{name} = excluded.{name}" for name in (*target.content, "version"))
    differs = _differs(target, "stored", "excluded")
    return f"""
INSERT INTO {target.table} AS stored ({columns}, origin, stored_at)
SELECT DISTINCT ON ({key}) {columns}, origin, now() FROM {source}
WHERE NOT EXISTS (SELECT 1 FROM {target.table} AS stored
                  WHERE {_same_key(target)} AND NOT ({_is_newer("incoming", target)}))
ORDER BY {best}
ON CONFLICT ({key}) DO UPDATE SET {taken},
    origin = CASE WHEN {differs} THEN excluded.origin ELSE stored.origin END,
    stored_at = CASE WHEN {differs} THEN excluded.stored_at ELSE stored.stored_at END
WHERE {_is_newer("excluded", target)}
RETURNING {key}, version, stored_at = now() AS changed"""


def comparison_sql(target: Target, source: str) -> str:
    """SQL that says how each delivery (column `n`) of `source` stands to what is stored.

    `is_newer`: something of it would be written now. `is_stale`: something of it differs from what is stored, and will
    not be. Of the source only the key, the version and what is ranked are read.
    """
    newer = f"stored.version IS NULL OR {_is_newer('incoming', target)}"
    stale = f"{_differs(target, 'stored', 'incoming')} AND NOT ({newer})"
    return f"""
SELECT incoming.n, bool_or({newer}) AS is_newer, bool_or({stale}) AS is_stale
FROM {source} LEFT JOIN {target.table} AS stored ON {_same_key(target)} GROUP BY incoming.n"""


def changed_rows_by_delivery_sql(target: Target, source: str) -> str:
    """SQL that says how many of the rows that this transaction has changed each delivery (column `n`) brought.

    For a source in which two deliveries have one key and version: what `upsert` returns does not tell them apart.
    """
    key = ", ".join(f"incoming.{name}" for name in target.key)
    same_row = f"{_same_key(target)} AND incoming.version = stored.version"
    return f"""
SELECT n, count(*) AS rows FROM (
    SELECT DISTINCT ON ({key}) incoming.n FROM {source} JOIN {target.table} AS stored ON {same_row}
    WHERE stored.stored_at = now() AND NOT ({_differs(target, "stored", "incoming")}) ORDER BY {key}, incoming.n
) AS winners GROUP BY n"""


def _is_newer(owner: str, target: Target) -> str:
    """The guard: whether a row takes the place of the stored one."""
    ranks_higher = f"{_row(owner, target)} > {_row('stored', target)}"
    return f"{owner}.version > stored.version OR ({owner}.version = stored.version AND {ranks_higher})"


def _same_key(target: Target) -> str:
    return " AND ".join(f"incoming.{name} = stored.{name}" for name in target.key)


def _ranked(owner: str, name: str, for_null: str) -> str:
    return f"coalesce({owner}.{name}, {for_null})" if for_null else f"{owner}.{name}"


def _row(owner: str, target: Target) -> str:
    return f"({', '.join(_ranked(owner, *one) for one in target.rank)})"


def _differs(target: Target, one: str, other: str) -> str:
    names = [name for name, _ in target.rank]
    left, right = (", ".join(f"{owner}.{name}" for name in names) for owner in (one, other))
    return f"({left}) IS DISTINCT FROM ({right})"
