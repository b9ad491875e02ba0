"""Faults that the simulated provider makes when it is asked to, so that whoever reads it can be tested against them."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from random import Random
from threading import Lock
from typing import Annotated, Any, Literal

import msgspec

FaultStatus = Literal[
    "400", "401", "403", "404", "408", "409", "410", "413", "422", "425", "429", "500", "502", "503", "504"
]  # fmt: skip
Special = Literal["slow", "truncated", "expired_cursor", "short_page", "changing", "processing"]
Kind = FaultStatus | Special
# These have a meaning for some requests only.
LIMITED: frozenset[Kind] = frozenset({"expired_cursor", "short_page", "changing", "processing"})


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """One fault to make, as `POST /simulate/faults` takes it.

    kind         a status of 400 to 504 that a client may meet: that status; slow: answers after `seconds`; truncated:
                 breaks off in the middle of the body; expired_cursor: 400 to whatever continues with a cursor;
                 short_page: a page of at most `records`, or an empty one, with a cursor where there is more;
                 changing: after the answer, `records` of the summaries or moments of a timeseries in the window that
                 was asked for are revised, the first and the last among them; see GET /simulate/changes;
                 processing: 200, but no data yet (Terra), and `seconds` until there will be
    where        part of the path and query that a request must have; empty: every request
    times        how often it is made; absent: until the faults are cleared
    share        the part of the matching requests it is made for, from 0 to 1, drawn with a seeded generator
    retry_after  seconds that a Retry-After header asks for; absent: no such header
    as_date      says that header as a date
    seconds      how slow is slow, how long is processing
    records      of short_page (absent: none) and changing (absent: 10)
    """

    kind: Kind
    where: str = ""
    times: int | None = None
    share: float = 1.0
    retry_after: float | None = None
    as_date: bool = False
    seconds: float = 1.0
    records: Annotated[int, msgspec.Meta(ge=0)] | None = None


@dataclass
class _Rule:
    fault: Fault
    left: int | None


class Faults:
    """The faults in force. Safe to use from several threads. `on_pick` is told of each that is made."""

    def __init__(self, seed: int = 0, on_pick: Callable[[Fault], None] | None = None) -> None:
        self._dice = Random(seed)  # noqa: S311 - repeatable on purpose
        self._rules: list[_Rule] = []
        self._lock = Lock()
        self._on_pick = on_pick

    def add(self, kind: Kind, **options: Any) -> None:
        """Puts a fault in force; `options` are the other fields of Fault. Raises msgspec.ValidationError."""
        self.put(msgspec.convert({"kind": kind, **options}, Fault))

    def put(self, fault: Fault) -> None:
        """Puts a fault in force, after those that are already."""
        with self._lock:
            self._rules.append(_Rule(fault, fault.times))

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        with self._lock:
            self._rules.clear()

    def pick(self, path: str, possible: Collection[Kind] = ()) -> Fault | None:
        """The first fault that is to be made for this request, which counts as made.

        Of the LIMITED kinds only those are that are `possible` for it.
        """
        with self._lock:
            fault = next((rule.fault for rule in self._rules if self._applies(rule, path, possible)), None)
        if fault and self._on_pick:
            self._on_pick(fault)
        return fault

    def _applies(self, rule: _Rule, path: str, possible: Collection[Kind]) -> bool:
        fault = rule.fault
        if rule.left == 0 or fault.where not in path or (fault.kind in LIMITED and fault.kind not in possible):
            return False
        if self._dice.random() >= fault.share:
            return False
        if rule.left is not None:
            rule.left -= 1
        return True
