"""What users granted, in Junction's events and in its lists of connections."""

from datetime import UTC, datetime
from typing import Any

import msgspec

from tests.support import START, event
from tests.support.cases import each
from tests.support.junction import RECORDED, USER, dead, parsed
from workers.actions import Connection, Grants
from workers.aggregators.junction import introspection

ASKED_AT = datetime(2026, 3, 15, tzinfo=UTC)
NO_SCOPES: dict[str, list[str]] = {"required": [], "optional": []}
# From Junction's OpenAPI document (ProviderConnectionCreated).
BODY = {
    "status": "available",
    "scope_requirements": {"user_granted": {"required": ["weight"], "optional": []}, "user_denied": NO_SCOPES},
}
SLEEP = {
    "status": "unavailable",
    "scope_requirements": {"user_granted": NO_SCOPES, "user_denied": {"required": ["sleep"], "optional": ["spo2"]}},
}
CONNECTED = Connection("u1", "fitbit", "connected", None, START)


def connected(availability: Any) -> dict[str, Any]:
    data = {"provider": {"slug": "fitbit"}, "resource_availability": availability}
    return event("provider.connection.created", "u1", data)


def test_the_public_example() -> None:
    """Breaks if a resource whose required scope was denied counts as granted, or a granted one as denied."""
    grants = Grants("u1", "fitbit", (("body", True), ("sleep", False)), START)
    assert parsed(connected({"body": BODY, "sleep": SLEEP})).actions == (CONNECTED, grants)


def test_a_recorded_event() -> None:
    granted = tuple((name, True) for name in ("sleep", "activity", "heartrate", "hrv"))
    assert parsed(RECORDED["today_connection"]).actions[1:] == (Grants(USER, "oura", granted, START),)


@each(None, {})
def test_an_event_without_grants(availability: Any) -> None:
    found = parsed(connected(availability))
    assert (found.actions, found.notes) == ((CONNECTED,), ())


@each(
    *({"sleep": odd} for odd in (None, 7, "available", [], {}, {"status": None}, {"status": "limited"})),
    {"": BODY},
    {"x" * 257: BODY},
)
def test_an_odd_grant_costs_itself(odd: dict[str, Any]) -> None:
    """Breaks if one null hides the connection or the other grants, or passes without a note."""
    found = parsed(connected(odd | {"body": BODY}))
    assert found.actions == (CONNECTED, Grants("u1", "fitbit", (("body", True),), START))
    assert found.notes == ("grants that cannot be read: 1",)


@each("available", 7, [BODY], True)
def test_odd_grants_cost_no_connection(odd: Any) -> None:
    found = parsed(connected(odd))
    assert (found.actions, found.notes) == ((CONNECTED,), ("grants that cannot be read: 1",))


def test_scopes_are_not_read() -> None:
    """Breaks if scopes of an unknown form cost the grant, although they are not stored."""
    odd_scopes = BODY | {"scope_requirements": [None, {"user_granted": 7}]}
    assert parsed(connected({"body": odd_scopes})).actions[1] == Grants("u1", "fitbit", (("body", True),), START)


def test_grants_in_a_list_of_connections() -> None:
    """Breaks if an unreadable grant counts as an unreadable connection, which ends the search for lost connections."""
    entries = [{"slug": "GARMIN", "resource_availability": {"sleep": SLEEP, "body": None}}, {"slug": "oura"}]
    listing = introspection.read_connections("u1", msgspec.json.encode({"providers": entries}), ASKED_AT)
    assert listing.rows == (
        Connection("u1", "garmin", "connected", None, ASKED_AT),
        Grants("u1", "garmin", (("sleep", False),), ASKED_AT),
        Connection("u1", "oura", "connected", None, ASKED_AT),
    )
    assert (listing.unread, listing.unread_parts) == (0, 1)


@each(
    "labtest.order_tracking.updated", "checkout.session.created", "checkout.session.updated", "checkout.quote.created"
)
def test_events_of_orders_need_no_user(name: str) -> None:
    """Breaks if an event outside the OpenAPI document counts as unknown, or becomes a dead letter without a user."""
    for user in ({}, {"user_id": "u1"}, {"user_id": None}):
        found = parsed({"event_type": name, "team_id": "t1", "data": {"id": "x"}} | user)
        assert (found.ignored, found.actions) == ("no wearable data", ())
    assert "no user" in dead({"event_type": "daily.data.sleep.created", "data": {}})
