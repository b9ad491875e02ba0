"""Attacks by senders with a secret or a captured request, and by a client of the broker."""

import json
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import psycopg
import redis

from tests.bench.attacks.good import PATH, post
from tests.bench.attacks.target import Signals, Target
from tests.bench.load import workout_event
from tests.support import START, heartrate, message_id, until
from tests.support.fuzzing import junction_headers, odd, terra_headers
from tests.support.terra import event as terra_event
from tests.support.terra import item

SAMPLES = 700_000
BRACKETS = 60_000_000  # bytes
PAUSE_SECONDS = 0.5  # between two poisonous deliveries
ODD_MESSAGES, CHUNK = 10_000, 500
VICTIMS = 50
TERRA_PATH, LANE = "/webhooks/terra", "live"
LOCK = "SELECT 1 FROM headrace.users WHERE user_id = %s FOR UPDATE"
SETTLED = "SELECT 1 FROM health.deliveries WHERE message_id = %s"


def send(target: Target, body: bytes) -> str:
    """Sends a signed event of Junction. Returns its id."""
    now = datetime.now(UTC)
    name = message_id(now)
    post(target, PATH, body, junction_headers(body, name, int(now.timestamp()), target.junction_secret))
    return name


def send_terra(target: Target, body: bytes, **headers: str) -> int:
    """Sends a signed event of Terra. Returns the status."""
    signed = terra_headers(body, secrets.token_hex(8), int(time.time()), target.terra_secret)
    return post(target, TERRA_PATH, body, signed | headers)


def long_ids(target: Target, signals: Signals) -> str:
    """Sends events with a `user_id` of 3,000 characters that do not compress: too long for an index of PostgreSQL."""
    return _repeat(signals, lambda: send(target, _encode(workout_event(secrets.token_hex(1500), 1))))


def long_references(target: Target, signals: Signals) -> str:
    """Sends one captured event of Terra with 8 kB in a header that is not signed."""
    body = _encode(terra_event("activity", item()))
    return _repeat(signals, lambda: send_terra(target, body, **{"Terra-Reference": secrets.token_hex(4000)}))


def brackets(target: Target, signals: Signals) -> str:
    """Sends a body of 60 MB that consists of empty arrays."""
    body = b"[" + b"[]," * (BRACKETS // 3) + b"[]]"
    signals.ready.set()
    send(target, body)
    signals.over.wait()
    return f"one body of {len(body):,} bytes"


def revised(target: Target, signals: Signals) -> str:
    """Sends a second version of 700,000 stored samples."""
    name = send(target, samples(61))
    with psycopg.connect(target.database_url, autocommit=True) as connection:
        until(lambda: connection.execute(SETTLED, (name,)).fetchone(), 300, every=1)
        signals.ready.set()
        name = send(target, samples(62))
        signals.over.wait()
        found = connection.execute(SETTLED, (name,)).fetchone()
    return f"the second version was {'' if found else 'not '}applied during the attack"


def samples(value: int, count: int = SAMPLES) -> bytes:
    """An event with many heart rates, one second apart."""
    times = ((START + timedelta(seconds=second)).isoformat() for second in range(count))
    text = ",".join(f'{{"timestamp":"{at}","value":{value},"unit":"bpm"}}' for at in times)
    return _encode(heartrate("many-samples", {})).replace(b'"data":[]', b'"data":[%s]' % text.encode())


def locked_row(target: Target, signals: Signals) -> str:
    """Sends events of a user whose row another client of the database has locked."""
    name = send(target, _encode(workout_event("locked", 0)))
    with psycopg.connect(target.database_url) as connection:
        until(lambda: _committed(connection, name), 60)
        connection.execute(LOCK, ("locked",))
        return _repeat(signals, lambda: send(target, _encode(workout_event("locked", secrets.randbelow(100_000)))))


def _committed(connection: psycopg.Connection, name: str) -> bool:
    found = connection.execute(SETTLED, (name,)).fetchone() is not None
    connection.rollback()
    return found


def terra_names_junction(target: Target, signals: Signals) -> str:
    """A flood of Terra events that name Junction's users: workouts, deletions, and changes of the user id."""
    before = {}
    for number in range(VICTIMS):
        body = workout_event(f"victim-{number}", number)
        before[body["data"]["id"]] = f"victim-{number}"
        send(target, _encode(body))
    query = "SELECT id, user_id FROM health.workouts WHERE id = ANY(%s) AND provider = 'garmin'"
    with psycopg.connect(target.database_url, autocommit=True) as connection:
        until(lambda: len(connection.execute(query, (list(before),)).fetchall()) == VICTIMS, 60)
        statuses = _flood(signals, target, before)
        time.sleep(5)
        after = {str(one): user for one, user in connection.execute(query, (list(before),)).fetchall()}
    changed = sum(after.get(one) != user for one, user in before.items())
    return f"{statuses.total():,} events; {changed} of {VICTIMS} of Junction's workouts moved or retracted"


def _flood(signals: Signals, target: Target, victims: dict[str, str]) -> Counter[int]:
    statuses = Counter[int]()

    def work() -> None:
        while not signals.over.is_set():
            workout, user = random.choice(list(victims.items()))
            statuses[send_terra(target, _encode(terra_attack(workout, user)))] += 1

    signals.ready.set()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def terra_attack(workout: str, user: str) -> dict[str, Any]:
    """An event of Terra that overwrites or deletes a workout of this user, or changes the user's id."""
    account = {"user_id": user, "provider": "GARMIN"}
    kind = random.randrange(3)
    if kind == 2:
        return {
            "type": "user_reauth",
            "old_user": account,
            "new_user": {"user_id": f"{user}-of-terra", "provider": "GARMIN"},
        }
    metadata = {"summary_id": workout, "start_time": START.isoformat(), "end_time": START.isoformat(), "type": 8}
    return terra_event("activity", {"metadata": metadata | {"upload_type": 4 if kind else 1}}, user=account)


def odd_messages(target: Target, signals: Signals) -> str:
    """Puts 10,000 odd messages into the live lane: no JSON, no task, tasks with other arguments and headers."""
    messages = list(odd_tasks(random.Random(7)))
    with redis.Redis.from_url(target.broker_url) as broker:
        signals.ready.set()
        for first in range(0, ODD_MESSAGES, CHUNK):
            broker.lpush(LANE, *messages[first : first + CHUNK])
        signals.over.wait()
    return f"{ODD_MESSAGES:,} messages"


def odd_tasks(dice: random.Random) -> Iterator[bytes]:
    """ODD_MESSAGES messages, in kombu's format or nearly."""
    bodies: list[Any] = [{}, [], None, 1, "x", [[], {}], [["x"], {}, {}], [[{}], {}, {"chain": [{}]}], [[[]] * 100]]
    for number in range(ODD_MESSAGES):
        headers = {
            "task": "headrace.apply",
            "id": f"odd-{number}",
            "retries": 0,
            "lang": "py",
            "root_id": f"odd-{number}",
        }
        properties = {"delivery_tag": f"odd-{number}", "delivery_info": {"exchange": "", "routing_key": LANE}}
        properties |= {"body_encoding": "utf-8", "correlation_id": f"odd-{number}"}
        message: dict[str, Any] = {"body": json.dumps(dice.choice(bodies)), "content-type": "application/json"}
        message |= {"content-encoding": "utf-8", "headers": headers, "properties": properties}
        part = dice.choice([message, headers, properties])
        for _ in range(dice.randrange(3)):
            part[dice.choice([*part, "expires", "eta", "timelimit", "task"])] = odd(dice)
        yield json.dumps(message).encode(errors="replace") if dice.random() < 0.9 else dice.randbytes(50)


def _repeat(signals: Signals, attack: Any) -> str:
    """Attacks until `over`. Returns the number of deliveries."""
    number = 0
    signals.ready.set()
    while not signals.over.wait(PAUSE_SECONDS):
        attack()
        number += 1
    return f"{number:,} deliveries"


def _encode(body: Any) -> bytes:
    return msgspec.json.encode(body)


ATTACKS = {
    "poison-long-id": long_ids,
    "poison-reference": long_references,
    "poison-brackets": brackets,
    "poison-revised": revised,
    "poison-locked-row": locked_row,
    "terra-names-junction": terra_names_junction,
    "odd-messages": odd_messages,
}
