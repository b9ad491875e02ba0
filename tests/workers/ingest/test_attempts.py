"""Deliveries with the same signed time and body are one, whatever their unsigned headers say."""

import base64
import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import OLD_VERSION, Delivery, Receipt, pack, seal
from app.errors import TryLater, Unprocessable
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, apply, rows
from tests.support.deliveries import SEALER, bodies, received
from workers.ingest.apply import Applier
from workers.ingest.parse import extract_deliveries
from workers.ingest.replay import replay_dead_letters
from workers.store import dead_letters
from workers.store.archive import ArchiveWindow, read

T0 = 1_773_512_405_000
COUNTER = itertools.count()
LEDGER = "SELECT message_id, outcome, attempts FROM headrace.deliveries ORDER BY message_id"


def body(calories: float) -> dict[str, Any]:
    """An event with a day's calories."""
    day = {"start_time": "2026-03-14T00:00:00+00:00", "end_time": "2026-03-15T00:00:00+00:00", "upload_type": 1}
    user = {"user_id": "terra-1", "provider": "GARMIN"}
    return {
        "type": "daily",
        "user": user,
        "data": [{"metadata": day, "calories_data": {"total_burned_calories": calories}}],
    }


def sent(
    content: Any, digest: int, *, ordering: int | None = T0, name: str | None = None, sealer: Sealer = SEALER
) -> Delivery:
    """A delivery of Terra's with this digest, by default under another trace id than all others."""
    raw = content if isinstance(content, bytes) else msgspec.json.encode(content)
    name = name or f"trace-{next(COUNTER):04}"
    return seal("terra", Receipt(name, ordering, None, digest.to_bytes(16)), raw, sealer)


def calories(engine: Engine) -> list[Any]:
    return [row["total"] for row in rows(engine, "SELECT payload #>> '{calories_data,total_burned_calories}' AS total "
                                                 "FROM health.activity")]  # fmt: skip


def test_replays_under_other_ids_are_attempts_of_the_first(engine: Engine, settings: Settings) -> None:
    """Breaks if 200 replays of one captured request add 200 rows to the ledger and 200 bodies to the archive."""
    first, *replays = (sent(body(100), 1, ordering=T0 + 1000 * n) for n in range(201))
    assert apply(engine, settings, first) == {"applied": 1}
    for start in range(0, 200, 50):
        assert apply(engine, settings, *replays[start : start + 49]) == {"duplicate": 1}
        assert apply(engine, settings, replays[start + 49]) == {"duplicate": 1}
    assert rows(engine, LEDGER) == [{"message_id": first.message_id, "outcome": "applied", "attempts": 201}]
    assert len(bodies(engine, "archive")) == 1


def test_equal_deliveries_of_one_message_are_one(engine: Engine, settings: Settings) -> None:
    """Breaks if the first message that contains a delivery and its replays stores each of them."""
    equal = [sent(body(100), 1) for _ in range(5)]
    assert sum(apply(engine, settings, *equal, sent(body(7), 2)).values()) == 2
    assert [row["attempts"] for row in rows(engine, LEDGER)] == [5, 1]


def test_an_old_body_with_a_later_ordering_time_does_not_win(engine: Engine, settings: Settings) -> None:
    """Breaks if a replayed body is newer than an update that arrived in between."""
    apply(engine, settings, sent(body(100), 1, ordering=T0))
    apply(engine, settings, sent(body(200), 2, ordering=T0 + 2000))
    assert apply(engine, settings, sent(body(100), 1, ordering=T0 + 4000)) == {"duplicate": 1}
    assert calories(engine) == ["200"]
    assert apply(engine, settings, sent(body(100), 1, ordering=None)) == {"duplicate": 1}
    assert calories(engine) == ["200"]


def test_a_value_that_returns_is_applied(engine: Engine, settings: Settings) -> None:
    """Breaks if of A, B, A, signed at three times, the second A counts as a replay of the first."""
    for number, value in enumerate((100, 200, 100)):
        assert apply(engine, settings, sent(body(value), number, ordering=T0 + 1000 * number)) == {"applied": 1}
    assert calories(engine) == ["100"]
    assert len(rows(engine, LEDGER)) == 3


def test_another_signed_time_with_the_same_id_is_an_attempt(engine: Engine, settings: Settings) -> None:
    """Breaks if a retry that Terra signs anew is another delivery."""
    for digest in (1, 2):
        apply(engine, settings, sent(body(100), digest, name="trace"))
    assert rows(engine, LEDGER) == [{"message_id": "trace", "outcome": "applied", "attempts": 2}]


@pytest.mark.parametrize("redelivered", [False, True])
def test_workers_that_apply_equal_deliveries_at_once(engine: Engine, settings: Settings, redelivered: bool) -> None:
    """Breaks if of two workers one makes a dead letter of the other's delivery, or both store it."""
    appliers = [Applier(engine, settings) for _ in range(2)]

    def run(applier: Applier, one: Delivery) -> None:
        while True:
            try:
                applier.apply(pack([one, sent(body(5), next(COUNTER) + 1000)]), redelivered=redelivered)
            except TryLater:
                continue
            return

    with ThreadPoolExecutor(2) as pool:
        for digest in range(20):
            list(pool.map(run, appliers, [sent(body(digest), digest) for _ in appliers]))
    found = rows(engine, "SELECT outcome, attempts FROM headrace.deliveries WHERE digest < decode(:d, 'hex')",
                 d=(1000).to_bytes(16).hex())  # fmt: skip
    assert len(found) == 20
    assert {row["attempts"] for row in found} == {2}
    assert dead_letters.listed(engine) == []


def test_a_replay_of_a_dead_delivery_is_its_attempt(engine: Engine, settings: Settings) -> None:
    """Breaks if a body that cannot be applied adds a dead letter with each replay."""
    for _ in range(5):
        assert apply(engine, settings, sent(b"{", 1)) == {"dead": 1}
    (entry,) = dead_letters.listed(engine)
    assert entry.attempts == 5
    assert bodies(engine, "dead_letters") == [b"{"]


def test_a_dead_delivery_is_resolved_under_the_first_id(engine: Engine, settings: Settings) -> None:
    """Breaks if the ledger and the archive name a resolved delivery differently, or its body cannot be opened."""
    first, again = sent(body(100), 1), sent(body(100), 1)
    with engine.begin() as connection:
        dead_letters.add_dead_letter(connection, first, "a fault of an older version")
    apply(engine, settings, sent(b"{", 1, name=first.message_id))
    assert apply(engine, settings, again) == {"applied": 1}
    assert rows(engine, LEDGER) == [{"message_id": first.message_id, "outcome": "applied", "attempts": 2}]
    assert rows(engine, "SELECT message_id FROM headrace.archive") == [{"message_id": first.message_id}]
    assert bodies(engine, "archive") == [msgspec.json.encode(body(100))]
    assert dead_letters.listed(engine) == []


def test_an_archived_delivery_is_replayed(engine: Engine, settings: Settings) -> None:
    """Breaks if `headrace replay` takes an archived delivery for its own replay by a stranger, and skips it."""
    apply(engine, settings, sent(body(100), 1))
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM headrace.activity")
    now = datetime.now(UTC).timestamp()
    window = ArchiveWindow(datetime.fromtimestamp(now - 600, UTC), datetime.fromtimestamp(now + 600, UTC))
    (found,) = read(engine, window)
    Applier(engine, settings).replay(found)
    assert calories(engine) == ["100"]


def test_an_undated_attempt_keeps_the_time_of_the_first(engine: Engine, settings: Settings) -> None:
    """Breaks if the body of a delivery, whose time of receipt was replaced, cannot be opened from the archive."""
    first = received(sent(b"{", 1, ordering=None, name="trace"), datetime.fromtimestamp(T0 / 1000, UTC))
    apply(engine, settings, first)
    apply(engine, settings, sent(body(100), 2, ordering=None, name="trace"))
    assert bodies(engine, "archive") == [msgspec.json.encode(body(100))]


def test_a_forged_delivery_is_stored_as_a_raw_message(engine: Engine, settings: Settings) -> None:
    """Breaks if a message without a valid body can settle, delay or antedate the delivery whose id it names."""
    bare, changed = sent(body(1), 1, name="a", sealer=Sealer([])), sent(body(2), 2, name="b")
    forged = [bare, msgspec.structs.replace(changed, ordering_ms=T0 + 1)]
    assert apply(engine, settings, *forged, sent(body(3), 3, name="c")) == {"dead": 2, "applied": 1}
    assert {row["message_id"] for row in rows(engine, LEDGER)} >= {"c"}
    assert {row["message_id"] for row in rows(engine, LEDGER)}.isdisjoint({"a", "b"})
    entries = dead_letters.listed(engine)
    assert {entry.aggregator for entry in entries} == {"unknown"}
    assert len({entry.reason for entry in entries}) == 2
    assert replay_dead_letters(engine, Applier(engine, settings), entries) == {"dead": 2}
    assert dead_letters.listed(engine) == entries
    assert calories(engine) == ["3"]
    assert apply(engine, settings, changed) == {"stale": 1}


def test_a_forged_delivery_does_not_replace_a_genuine_one(engine: Engine, settings: Settings) -> None:
    """Breaks if a forged delivery that names the id of another one of its message lets that one be dropped."""
    genuine = sent(body(1), 1, name="a")
    forged = [msgspec.structs.replace(sent(body(2), 2, name="a"), ordering_ms=T0 + n) for n in (1, 2)]
    locked = sent(body(3), 3, name="a", sealer=Sealer([bytes(32)]))
    assert apply(engine, settings, *forged, locked, genuine) == {"applied": 1, "dead": 2}
    assert calories(engine) == ["1"]
    assert {row["message_id"]: row["attempts"] for row in rows(engine, LEDGER)}["a"] == 2
    assert len(bodies(engine, "dead_letters")) == 2


@pytest.mark.parametrize(
    "raw", [b"1", b"[1e300]", b"[]", b"{}", b"[{}]", b"[[]]", b"null", b"[" * 5000, b"\xff", b'[["\\ud800"]]']
)
def test_a_raw_message_of_any_content_stays_a_dead_letter(raw: bytes) -> None:
    """Breaks if a hostile message among the dead letters ends `headrace dead replay` or an erasure."""
    with pytest.raises(Unprocessable):
        extract_deliveries(raw)


def test_a_message_of_the_old_version_is_applied_by_a_replay(engine: Engine, settings: Settings) -> None:
    """Breaks if a message that was queued during an upgrade is lost, or one without encryption is replayed."""
    sealed, bare = sent(body(1), 1), sent(body(2), 2, sealer=Sealer([]))
    first, nonce = b"\x02", bytes(12)
    text = AESGCM(ENCRYPTION_KEY).encrypt(nonce, msgspec.json.encode(body(1)), first + sealed.key.encode())
    old = first + hashlib.sha256(ENCRYPTION_KEY).digest()[:4] + nonce + text
    for one in (msgspec.structs.replace(sealed, sealed=old), bare):
        message = msgspec.msgpack.encode([OLD_VERSION, [msgspec.structs.astuple(one)[:6]]])
        assert Applier(engine, settings).apply(base64.b64encode(message).decode()).outcomes == {"dead": 1}
    entries = dead_letters.listed(engine, reason="a message of version 1")
    assert replay_dead_letters(engine, Applier(engine, settings), entries) == {"applied": 1, "dead": 1}
    assert (calories(engine), len(dead_letters.listed(engine))) == (["1"], 1)


def test_without_a_key_nothing_is_authenticated(engine: Engine, settings: Settings) -> None:
    """Breaks if a deployment without a key refuses its own deliveries."""
    unkeyed = replace(settings, encryption_keys=())
    assert apply(engine, unkeyed, sent(body(1), 1, sealer=Sealer([]))) == {"applied": 1}
