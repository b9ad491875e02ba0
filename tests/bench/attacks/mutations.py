"""100,000 requests over HTTP, half of them mutated without a valid signature and half signed with a mutated body."""

import http.client
import random
import threading
import time
from collections import Counter

from tests.bench.attacks.target import Signals, Target
from tests.bench.attacks.watch import resident
from tests.support import START, message_id, until
from tests.support.fuzzing import Mutator, junction_events, junction_headers, terra_events, terra_headers
from tests.support.fuzzing_requests import Pairs, mutated

REQUESTS, THREADS = 100_000, 8
SHARES = [tenth / 10 for tenth in range(1, 11)]
PEOPLE = ("u1", "u2", "t1", "t2")
EVENTS = {"junction": junction_events, "terra": terra_events}


class _Client(threading.Thread):
    """Sends its share of the requests over one connection, which is opened again when the server has closed it."""

    def __init__(self, target: Target, seed: int) -> None:
        super().__init__()
        self._target, self._dice = target, random.Random(seed)
        self._mutators = {name: Mutator(self._dice, events(), PEOPLE) for name, events in EVENTS.items()}
        self.statuses = Counter[str]()

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._target.host, self._target.port, timeout=30)
        for _ in range(REQUESTS // THREADS):
            path, headers, body = self._request()
            try:
                connection.request("POST", path, body, headers)
                answer = connection.getresponse()
                answer.read()
                self.statuses[str(answer.status)] += 1
            except ValueError:  # http.client refuses a header of a mutation
                self.statuses["not sent"] += 1
                connection.close()
            except (OSError, http.client.HTTPException) as error:
                self.statuses[type(error).__name__] += 1
                connection.close()

    def _request(self) -> tuple[str, Pairs, bytes]:
        name, now = self._dice.choice(list(EVENTS)), int(time.time())
        body, message = self._mutators[name].body(), message_id(START, self._dice.getrandbits(100))
        if name == "junction":
            headers = junction_headers(body, message, now, self._target.junction_secret)
        else:
            headers = terra_headers(body, message, now, self._target.terra_secret)
        if self._dice.random() < 0.5:
            headers, body = mutated(self._dice, headers, body)
        return f"/webhooks/{name}", headers, body


def hundred_thousand(target: Target, signals: Signals) -> str:
    """Sends REQUESTS requests, also if that takes longer than the other attacks."""
    clients = [_Client(target, seed) for seed in range(THREADS)]
    signals.ready.set()
    for client in clients:
        client.start()
    marks = []
    for share in SHARES:
        until(lambda share=share: sum(one.statuses.total() for one in clients) >= share * REQUESTS, 900, every=0.2)
        marks.append(f"{resident(target)[0]['web']:,.1f}")
    for client in clients:
        client.join()
    statuses = sum((client.statuses for client in clients), Counter[str]())
    answers = ", ".join(f"{count:,} x {status}" for status, count in sorted(statuses.items()))
    return f"{answers}; web, MB, at each tenth: {' '.join(marks)}"


ATTACKS = {"requests-100k": hundred_thousand}
