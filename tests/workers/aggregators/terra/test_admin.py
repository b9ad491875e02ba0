"""Terra's Admin API: the documented examples, both names of a field, and entries that cannot be read."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from app.config.settings import load
from app.errors import Misconfigured
from tests.support.cases import MALFORMED, each, refusal
from workers.aggregators.admin_token import Token
from workers.aggregators.listings import Listing
from workers.aggregators.requests import Request
from workers.aggregators.terra import admin
from workers.aggregators.terra.admin import AdminUser, ApiProblem, FailedDelivery

SENT = datetime(2026, 9, 10, 7, 0, 12, 34000, tzinfo=UTC)
EVENT = {  # the example of the specification of September 2026
    "event_id": "5a1f0c9e-1111-4222-8333-944455556666",
    "sent_at": "2026-09-10T07:00:12.034Z",
    "data_type": "sleep",
    "provider": "oura",
    "destination_type": "webhook",
    "http_status": 503,
    "response_time_ms": 2950,
    "bytes": 20480,
    "connection_id": "1900000000000000001",
}
FAILED = FailedDelivery("5a1f0c9e-1111-4222-8333-944455556666", SENT, "sleep", "oura")
USER = {"user_id": "T1", "provider": "OURA", "active": True, "reference_id": "member-1"}
USER |= {"most_recent_data_at": "2026-09-10T07:00:12.034Z", "created_at": "2026-09-10T07:00:12.034Z"}
LISTED = AdminUser("T1", "oura", is_active=True, reference_id="member-1", newest=SENT, created_at=SENT)


def raw(*rows: Any, **more: Any) -> bytes:
    return msgspec.json.encode({"data": rows, "has_more": False, "next_cursor": None} | more)


def test_deliveries_and_users_are_asked_for() -> None:
    """Breaks if a request for failed deliveries asks for all, for no window, or for another environment."""
    since = SENT - timedelta(days=1)
    asked = admin.events_request("a/b", "events", since=since, until=SENT, user_id="T1")
    query = (("outcome", "failed"), ("since", "2026-09-09T07:00:12.034Z"), ("until", "2026-09-10T07:00:12.034Z"))
    assert asked == Request("/environments/a%2Fb/events", (*query, ("user_id", "T1")))
    following = admin.events_request("dev", "webhook-events", since=since, until=SENT, cursor="c")
    assert following == Request("/environments/dev/webhook-events", (*query, ("cursor", "c")), True)
    assert admin.users_request("dev") == Request("/environments/dev/users")
    assert admin.token_request() == Request("/me")


def test_the_token_is_a_bearer_token_and_is_not_shown() -> None:
    """Breaks if the token is sent in another header, or appears in a text."""
    settings = load({"TERRA_ADMIN_TOKEN": "terra_at_canary", "TERRA_ADMIN_BASE_URL": "https://terra.test/admin/"})
    assert admin.connect(settings) == ("https://terra.test/admin", {"Authorization": "Bearer terra_at_canary"})
    assert "canary" not in repr(settings)
    with pytest.raises(Misconfigured, match="TERRA_ADMIN_TOKEN: not set"):
        admin.connect(load({}))


@each(
    (EVENT, FAILED),
    (EVENT | {"unknown": {"field": [1]}, "http_status": None, "connection_id": None}, FAILED),
    (EVENT | {"provider": {"name": "oura"}, "id": 7, "type": ["sleep"]}, replace(FAILED, provider="")),
    ({"event_id": FAILED.event_id, "sent_at": EVENT["sent_at"], "data_type": "sleep", "provider": "OURA"}, FAILED),
    (
        {"id": "evt_1", "created_at": EVENT["sent_at"], "type": "unified_api.sleep.updated"},
        FailedDelivery("evt_1", SENT, "sleep", ""),
    ),
)
def test_a_failed_delivery_is_read(row: Any, read: FailedDelivery) -> None:
    """Breaks if the documented row, one without optional fields, or one with the newer names is left out."""
    assert admin.read_events(raw(row)) == Listing((read,))


@each(
    *(None, 7, [], {}, "evt"),
    *(EVENT | {"event_id": value} for value in (None, 7, "")),
    *(EVENT | {"sent_at": value} for value in (None, "lately", [], 5)),
    *(EVENT | {"data_type": value} for value in (None, 7, "")),
)
def test_an_odd_delivery_costs_itself(odd: Any) -> None:
    """Breaks if one row of another form stops the comparison, or passes uncounted."""
    assert admin.read_events(raw(odd, EVENT)) == Listing((FAILED,), unread=1)


@each(
    (USER, LISTED),
    ({"user_id": "T1", "provider": "oura"}, AdminUser("T1", "oura", is_active=True)),
    ({"user_id": "T1", "provider": "oura", "active": False}, AdminUser("T1", "oura", is_active=False)),
    (
        {"user_id": "T1", "provider": "oura", "reference_id": 7, "created_at": "lately", "most_recent_data_at": None},
        AdminUser("T1", "oura", is_active=True),
    ),
)
def test_a_user_is_read(row: Any, read: AdminUser) -> None:
    """Breaks if an absent field, or one of no use, costs a user."""
    assert admin.read_users(raw(row)) == Listing((read,))


@each(
    *(None, 7, [], {}),
    *(USER | {"user_id": value} for value in (None, 7, "")),
    *(USER | {"provider": value} for value in (None, 7)),
    *(USER | {"most_recent_data_at": value} for value in ("lately", [], 5)),
)
def test_an_odd_user_costs_itself(odd: Any) -> None:
    """Breaks if one row of another form stops the comparison, or passes uncounted."""
    assert admin.read_users(raw(odd, USER)) == Listing((LISTED,), unread=1)


@each(
    ({"has_more": True, "next_cursor": "c"}, "c"),
    ({"next_cursor": "c"}, None),
    ({"has_more": None, "next_cursor": "c"}, "c"),
    ({"has_more": True}, None),
    ({"has_more": True, "next_cursor": 7}, "7"),
    ({"has_more": True, "next_cursor": False}, None),
)
def test_the_cursor_counts_while_there_is_more(more: Any, cursor: str | None) -> None:
    """Breaks if the last page is followed by another, or a page with a cursor is the last one."""
    assert admin.read_events(raw(**more)).cursor == cursor


@each(*MALFORMED, b"<html>", b'{"data": {}}', b'{"next_cursor": "canary"}')
def test_an_invalid_page_is_rejected(body: bytes) -> None:
    """Breaks if half an answer counts as a whole one, or its values get into an error's text."""
    for read in (admin.read_events, admin.read_users):
        refusal(read, body)


def test_an_odd_page_costs_its_odd_field() -> None:
    """Breaks if a null or a cursor of another form stops the comparison of all users, or passes uncounted."""
    assert admin.read_users(b'{"data": null}') == Listing(())
    assert admin.read_users(raw(USER, has_more=True, next_cursor=["canary"])) == Listing((LISTED,), unread=1)


@each(rb"\ud800", rb"\u0000", b"\xff")
def test_characters_that_cannot_be_stored_cost_nothing(character: bytes) -> None:
    """Breaks if one such character in one row ends the comparison of all users."""
    (user,) = admin.read_users(raw(USER | {"provider": "ou?ra"}, USER).replace(b"?", character)).rows[:1]
    assert user == replace(LISTED, provider="ou\ufffdra")
    (event,) = admin.read_events(raw(EVENT | {"provider": "ou?ra"}).replace(b"?", character)).rows
    assert event == replace(FAILED, provider="ou\ufffdra")
    assert admin.read_problem(b'{"code": "c%b"}' % character).text == "c\ufffd"
    assert admin.read_token(b'{"name": "%b"}' % character) == Token()


@each(
    ({"expires_at": EVENT["sent_at"], "grant_anchor_at": EVENT["sent_at"]}, (SENT, SENT)),
    ({"expires_at": None}, (None, None)),
    ({"expires_at": "never", "grant_anchor_at": {}}, (None, None)),
)
def test_the_life_of_the_token(body: Any, times: Any) -> None:
    """Breaks if a token without an end, or with times that cannot be read, ends the reconciliation."""
    assert admin.read_token(msgspec.json.encode(body)) == Token(expires_at=times[0], approved_at=times[1])


def test_a_problem_is_read() -> None:
    """Breaks if the missing scope is not named, or an error page of a proxy ends a worker."""
    body = b'{"type": "about:blank", "title": "t", "code": "scope_missing", "detail": "events:read is missing"}'
    assert admin.read_problem(body).text == "scope_missing: events:read is missing"
    assert admin.read_problem(b"<html>") == ApiProblem()
    assert admin.read_problem(b'{"code": 7}').text == ""
    leaking = b'{"code": "c", "detail": "terra_at_canary\\u0000 has\\nexpired"}'
    assert admin.read_problem(leaking).text == "c: TOKEN has expired"
    assert len(admin.read_problem(b'{"detail": "%s"}' % (b"x" * 5000)).text) == admin.MAX_DETAIL
