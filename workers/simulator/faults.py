"""Faults that the simulated APIs produce on request, to test clients against them."""

from collections.abc import Callable, Collection
from random import Random
from threading import Lock
from typing import Annotated, Any, Literal

import msgspec

FaultStatus = Literal[
    "400", "401", "403", "404", "408", "409", "410", "413", "422", "425", "429", "500", "502", "503", "504"
]  # fmt: skip
Special = Literal["slow", "truncated", "expired_cursor", "short_page", "changing", "processing"]
Kind = FaultStatus | Special
# Kinds that apply to some requests only.
LIMITED: frozenset[Kind] = frozenset({"expired_cursor", "short_page", "changing", "processing"})


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """One requested fault: the body of `POST /simulate/faults`.

    kind         a status from 400 to 504: responds with it; slow: responds after `seconds`; truncated: sends half of
                 the body; expired_cursor: 400 to any request with a cursor; short_page: a page of at most `records`
                 (default: 0), with a cursor if there are more; changing: after the response, revises `records`
                 (default: 10) of the summaries or moments in the requested window, among them the first and the last,
                 see GET /simulate/changes; processing: 200 without data (Terra), which follows after `seconds`
    where        text that the path and query of a request must contain; empty: every request
    times        how often the fault is produced; default: until the faults are cleared
    share        the share of matching requests, from 0 to 1, drawn with a seeded generator
    retry_after  seconds in the Retry-After header; default: no header
    as_date      whether Retry-After is a date
    """

    kind: Kind
    where: str = ""
    times: int | None = None
    share: float = 1.0
    retry_after: float | None = None
    as_date: bool = False
    seconds: float = 1.0
    records: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Faults:
    """The active faults. Safe to use from several threads. `on_pick` is called with each fault that is produced."""

    def __init__(self, seed: int = 0, on_pick: Callable[[Fault], None] | None = None) -> None:
        self._rng = Random(seed)  # noqa: S311 - repeatable on purpose
        self._active: list[Fault] = []
        self._lock = Lock()
        self._on_pick = on_pick

    def add(self, kind: Kind, **options: Any) -> None:
        """Activates a fault; `options` are the other fields of Fault. Raises msgspec.ValidationError."""
        self.put(msgspec.convert({"kind": kind, **options}, Fault))

    def put(self, fault: Fault) -> None:
        """Activates a fault, after those that are already active."""
        with self._lock:
            self._active.append(msgspec.structs.replace(fault))  # a copy, because its `times` counts down

    def clear(self) -> None:
        with self._lock:
            self._active.clear()

    def pick(self, path: str, possible: Collection[Kind] = ()) -> Fault | None:
        """The first active fault that applies to a request, and counts it as produced.

        Faults of a kind in LIMITED apply only if the kind is in `possible`.
        """
        with self._lock:
            fault = next((fault for fault in self._active if self._applies(fault, path, possible)), None)
            if fault and fault.times is not None:
                fault.times -= 1
        if fault and self._on_pick:
            self._on_pick(fault)
        return fault

    def _applies(self, fault: Fault, path: str, possible: Collection[Kind]) -> bool:
        if fault.times == 0 or fault.where not in path or (fault.kind in LIMITED and fault.kind not in possible):
            return False
        return self._rng.random() < fault.share
