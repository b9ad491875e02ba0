"""Totals and faults of finished drills."""

from typing import Any

from tests.support import START, heartrate, message_id, workout
from workers.verify.drill.faults import Injected
from workers.verify.drill.load import UNUSABLE, is_usable
from workers.verify.drill.plan import PlannedFault
from workers.verify.expected import wanted
from workers.verify.totals import Totals, reconcile_totals

EVENTS = {"a": workout("u", "w1"), "b": heartrate("u", {0: 60}), "c": workout("u", "w2"), "d": UNUSABLE[0]}
IDS = {name: message_id(START, number) for number, name in enumerate(EVENTS)}
ACCEPTED = {IDS[name]: event for name, event in EVENTS.items()}
NEWEST = wanted({name: event for name, event in ACCEPTED.items() if is_usable(event)}, {})
ROWS = [(key, content) for key, (_, (content,)) in NEWEST.items()]
LEDGER = [(IDS["a"], "applied"), (IDS["b"], "applied"), (IDS["c"], "duplicate"), (IDS["d"], "dead")]


def totals(**changes: Any) -> Totals:
    """The totals of a drill without errors, apart from these changes."""
    given: dict[str, Any] = {
        "ledger": LEDGER,
        "dead_letters": {IDS["d"]},
        "queued": set(),
        "newest": NEWEST,
        "rows": ROWS,
        "unusable": {IDS["d"]},
    }
    return reconcile_totals(ACCEPTED, **given | changes)


def injected(group: str, kind: str, began: float, seconds: float = 0.0) -> Injected:
    """A fault that was injected into a process."""
    return Injected(PlannedFault(0.0, kind, group, 0.0, seconds), began, 1, group)  # type: ignore[arg-type]
