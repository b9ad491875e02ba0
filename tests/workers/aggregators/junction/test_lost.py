"""Reports of lost deliveries, as Svix sends them and with what Junction may add."""

import copy
from typing import Any

from tests.support.cases import each
from tests.support.junction import RECORDED, parsed
from workers.actions import LostDelivery
from workers.aggregators.junction.events import EXHAUSTED

REPORT = RECORDED["svix_attempt_exhausted"]
BY = "msg_report"


def lost(data: Any, **envelope: Any) -> Any:
    (action,) = parsed({"type": EXHAUSTED, "data": data} | envelope, name=BY).actions
    return action


def test_a_recorded_report() -> None:
    """Breaks if Svix's own event, which has no event_type and no user, is ignored as unknown."""
    found = parsed(REPORT)
    assert (found.event_type, found.user_id, found.ignored) == (EXHAUSTED, None, None)
    assert found.actions == (LostDelivery("msg_x"),)


@each(
    ({"msgId": "m1", "user_id": "u1"}, {}, LostDelivery("m1", "u1")),
    ({"msgId": "m1"}, {"user_id": "u1", "client_user_id": "c1"}, LostDelivery("m1", "u1", "c1")),
    ({"msgId": "m1", "client_user_id": "c1"}, {"event_type": EXHAUSTED}, LostDelivery("m1", None, "c1")),
    ({"msgId": None, "msgEventId": "e1"}, {}, LostDelivery("e1")),
    ({"msgId": {}, "msgEventId": [], "user_id": {}}, {}, LostDelivery(f"report:{BY}")),
    ({"msgId": "m" * 300}, {}, LostDelivery("m" * 200)),
    *((odd, {}, LostDelivery(f"report:{BY}")) for odd in (None, [1], "x", 7, {})),
)
def test_every_form_of_a_report(data: Any, envelope: Any, expected: Any) -> None:
    """Breaks if a report of another form becomes a dead letter, or its user is not found."""
    assert lost(copy.deepcopy(data), **envelope) == expected


def test_a_report_keeps_nothing_else() -> None:
    """Breaks if the response of the endpoint, which may contain personal data, is stored outside the archive."""
    attempt = {"id": "a1", "responseStatusCode": 500, "response": "secret", "timestamp": "2026-03-14T06:30:00Z"}
    assert "secret" not in repr(parsed({"type": EXHAUSTED, "data": {"msgId": "m1", "lastAttempt": attempt}}))
