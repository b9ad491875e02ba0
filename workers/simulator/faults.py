"""Faults that the simulated provider makes when it is asked to, so that whoever reads it can be tested against them."""

from dataclasses import dataclass
from random import Random
from threading import Lock
from typing import Any, Literal

import msgspec

Kind = Literal["429", "503", "500", "401", "slow", "truncated", "expired_cursor"]


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """One fault to make, as `POST /simulate/faults` takes it.

    kind         429, 503, 500, 401: that status; slow: answers after `seconds`; truncated: breaks off in the middle of
                 the body; expired_cursor: 400 to whatever continues with a cursor
    where        part of the path that a request must have; empty: every request
    times        how often it is made; absent: until the faults are cleared
    share        the part of the matching requests it is made for, from 0 to 1, drawn with a seeded generator
    retry_after  seconds that a Retry-After header asks for; absent: no such header
    as_date      says that header as a date
    seconds      how slow is slow
    """

    kind: Kind
    where: str = ""
    times: int | None = None
    share: float = 1.0
    retry_after: float | None = None
    as_date: bool = False
    seconds: float = 1.0


@dataclass
class _Rule:
    fault: Fault
    left: int | None


class Faults:
    """The faults in force. Safe to use from several threads."""

    def __init__(self, seed: int = 0) -> None:
        self._dice = Random(seed)  # noqa: S311 - repeatable on purpose
        self._rules: list[_Rule] = []
        self._lock = Lock()

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

    def pick(self, path: str, *, has_cursor: bool = False) -> Fault | None:
        """The first fault that is to be made for this request, which counts as made."""
        with self._lock:
            return next((rule.fault for rule in self._rules if self._applies(rule, path, has_cursor=has_cursor)), None)

    def _applies(self, rule: _Rule, path: str, *, has_cursor: bool) -> bool:
        fault = rule.fault
        if rule.left == 0 or fault.where not in path or (fault.kind == "expired_cursor" and not has_cursor):
            return False
        if self._dice.random() >= fault.share:
            return False
        if rule.left is not None:
            rule.left -= 1
        return True
