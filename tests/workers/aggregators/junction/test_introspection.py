"""Junction's introspection: every status and shape, old and new, and the public examples."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec

from tests.support.cases import MALFORMED, each, refusal
from workers.actions import Connection, Grants
from workers.aggregators.junction import introspection
from workers.aggregators.junction.introspection import Pull, Refreshed, ResourceCoverage
from workers.aggregators.listings import Listing
from workers.aggregators.requests import Request

ASKED_AT = datetime(2026, 3, 20, 12, tzinfo=UTC)
JULY, OCTOBER = datetime(2023, 7, 24, tzinfo=UTC), datetime(2023, 10, 24, tzinfo=UTC)
# The examples of the public API document, word for word, but for the user_id, which is empty there.
RANGE = {"range_start": "2023-07-24T00:00:00+00:00", "range_end": "2023-10-24T00:00:00+00:00"}
RELEASE = {"release": "0.0.0-dev.cd0e262", "trace_id": "51cc7d2d72e98ed4eb63e2b0864b39e3"}
TIMELINE = {
    "scheduled_at": "2023-10-24T13:52:51+00:00",
    "started_at": "2023-10-24T13:52:54+00:00",
    "ended_at": "2023-10-24T13:53:59+00:00",
}
PULLED = RANGE | RELEASE | {"status": "success", "days_with_data": 70, "timeline": TIMELINE}
RETRIED = TIMELINE | {"started_at": "2023-10-24T13:53:01+00:00", "ended_at": "2023-10-24T13:53:04+00:00"}
RETRYING = PULLED | {"status": "retrying", "timeline": RETRIED, "error_details": "provider_rate_limit_exceeded"}
FITBIT = {"not_pulled": ["blood_oxygen"], "pulled": {"activity": PULLED, "sleep": RETRYING}}
PUBLIC_PULLS = {"data": [{"user_id": "u1", "provider": {"fitbit": FITBIT}}], "next_cursor": "None"}
STATISTICS = {
    "last_attempt": {"status": "success", "timestamp": "2023-10-24T13:13:27+00:00"},
    "newest_data": "2023-10-24T00:00:00+00:00",
    "oldest_data": "2023-06-21T00:00:00+00:00",
    "sent_count": 231,
}
PUBLIC_RESOURCES = {"data": [{"user_id": "u1", "provider": {"fitbit": {"activity": STATISTICS}}}]}
PUBLIC_CONNECTION = {
    "created_on": "2010-01-23T12:34:56+00:00",
    "error_details": {
        "error_message": "The user has deregistered the connection per notification from Garmin.",
        "error_type": "deregistered_per_provider",
        "errored_at": "2010-01-24T23:45:32+00:00",
    },
    "logo": "https://logo_url.com",
    "name": "Garmin",
    "resource_availability": {"sleep": {"status": "available"}},
    "slug": "garmin",
    "status": "error",
}
REFRESHED = {
    "failed_sources": ["oura/sleep"],
    "in_progress_sources": [],
    "refreshed_sources": ["withings/workouts", "withings/vitals/blood_pressure"],
    "success": True,
    "user_id": "1449752e-0d8a-40e0-9206-91ab099b2537",
}
REFUSED = {"error": "user has no connected sources", "failed_sources": [], "success": False, "user_id": "u1"}


def raw(body: Any) -> bytes:
    """An answer's body."""
    return body if isinstance(body, bytes) else msgspec.json.encode(body)


def page(*users: tuple[str, dict[str, Any]], **more: Any) -> bytes:
    """A page of either kind about some users."""
    return raw({"data": [{"user_id": user, "provider": provider} for user, provider in users], **more})


def pull(changes: dict[str, Any], without: str = "") -> Pull:
    """The one pull of a page: u1's sleep from Fitbit, as in the example but for the changes."""
    given = {name: value for name, value in (PULLED | changes).items() if name != without}
    (found,) = introspection.read_pulls(page(("u1", {"fitbit": {"pulled": {"sleep": given}, "not_pulled": []}}))).rows
    return found


# Requests


@each(
    (None, None, ()),
    ("", None, ()),
    (None, "u 1", (("user_id", "u 1"),)),
    ("abc", None, (("next_cursor", "abc"),)),
    ("abc", "u1", (("user_id", "u1"), ("next_cursor", "abc"))),
)
def test_a_page_is_asked_for(cursor: str | None, user: str | None, query: Any) -> None:
    """Breaks if a page is requested without its cursor, a cursor without its user, or an empty cursor is sent."""
    for ask, part in ((introspection.pulls_request, "historical_pull"), (introspection.coverage_request, "resources")):
        asked = Request(f"/v2/introspect/{part}", (("user_limit", "50"), *query), has_cursor=bool(cursor))
        assert ask(cursor, user) == asked


def test_an_id_stays_a_part_of_the_path() -> None:
    """Breaks if a user_id with a slash or a question mark reaches another path."""
    assert introspection.connections_request("a/b?c").path == "/v2/user/providers/a%2Fb%3Fc"
    assert introspection.refresh_request("a/b?c") == Request("/v2/user/refresh/a%2Fb%3Fc", method="POST")
    assert introspection.connections_request("a").method == "GET"


# Pulls


def test_the_public_example_of_pulls_is_read() -> None:
    """Breaks if the page that the public document shows is refused, or its text "None" is followed as a cursor."""
    began = [datetime(2023, 10, 24, 13, 52, 54, tzinfo=UTC), datetime(2023, 10, 24, 13, 53, 1, tzinfo=UTC)]
    told = "retrying, provider_rate_limit_exceeded"
    assert introspection.read_pulls(raw(PUBLIC_PULLS)) == Listing(
        (
            Pull("u1", "fitbit", "activity", "pulled", JULY, OCTOBER, began[0], 70, "success"),
            Pull("u1", "fitbit", "sleep", "pulling", JULY, OCTOBER, began[1], 0, told),
            Pull("u1", "fitbit", "blood_oxygen", "not pulled"),
        ),
        ("u1",),
        None,
    )


@each(
    ("success", None, "pulled", "success"),
    ("failure", "non_retriable_error", "failed", "failure, non_retriable_error"),
    ("failure", "one_that_is_new", "failed", "failure, one_that_is_new"),
    ("failure", None, "failed", "failure"),
    ("scheduled", None, "pulling", "scheduled"),
    ("in_progress", None, "pulling", "in_progress"),
    ("retrying", "provider_unavailable", "pulling", "retrying, provider_unavailable"),
)
def test_every_status_of_a_pull(status: Any, details: Any, read: Any, told: Any) -> None:
    """Breaks if a running pull counts as missing, a failed one as our failure, or the error is lost."""
    found = pull({"status": status, "error_details": details})
    assert (found.status, found.status_text) == (read, told)
    assert found.days_with_data == (70 if read == "pulled" else 0)
    assert (found.start, found.end) == (JULY, OCTOBER)


@each(
    ({}, JULY, OCTOBER),
    ({"range_start": None, "range_end": None}, None, None),
    ({"range_start": None, "range_end": None, "start": JULY, "end": OCTOBER}, JULY, OCTOBER),
    ({"start": "2001-01-01", "end": "2001-01-02"}, JULY, OCTOBER),
    ({"range_start": "2023-07-24", "range_end": "2023-10-24T00:00:00"}, JULY, OCTOBER),
    ({"range_start": "2023-07-24T02:00:00+02:00", "range_end": "2023-10-24T00:00:00Z"}, JULY, OCTOBER),
    ({"range_start": "", "range_end": 1698105600}, None, OCTOBER),
    ({"range_start": "0001-01-01T00:00:00+05:00"}, datetime(2000, 1, 1, tzinfo=UTC), OCTOBER),
    ({"range_start": RANGE["range_end"], "range_end": RANGE["range_start"]}, OCTOBER, JULY),
)
def test_the_range_of_a_pull(changes: Any, start: Any, end: Any) -> None:
    """Breaks if an older answer, one without a range or one with a wrong range costs the whole page."""
    found = pull(changes)
    assert (found.start, found.end) == (start, end)
    assert found.status == "pulled"


@each(
    (TIMELINE, datetime(2023, 10, 24, 13, 52, 54, tzinfo=UTC)),
    (TIMELINE | {"started_at": None}, datetime(2023, 10, 24, 13, 52, 51, tzinfo=UTC)),
    ({}, None),
    (None, None),
)
def test_when_a_pull_began(timeline: dict[str, Any] | None, began: datetime | None) -> None:
    """Breaks if a pull after a re-authorisation looks like the one before, or a timeline is required."""
    assert pull({"timeline": timeline}).began == began


@each("timeline", "days_with_data", "release", "trace_id", "error_details")
def test_optional_fields_of_a_pull(without: str) -> None:
    """Breaks if a field that is of no use, or is optional, costs a page."""
    found = pull({}, without)
    assert found.days_with_data == (0 if without == "days_with_data" else 70)
    assert found.began == (None if without == "timeline" else datetime(2023, 10, 24, 13, 52, 54, tzinfo=UTC))


def test_every_user_provider_and_resource_is_read() -> None:
    """Breaks if a user without a provider, a provider in capitals or a resource that is new is lost."""
    body = page(
        ("u1", {"Garmin": {"pulled": {"sleep": PULLED}, "not_pulled": ["steps", "brain_waves"]}, "oura": {}}),
        ("u2", {}),
        ("u3", {"oura": {"pulled": {"brain_waves": PULLED}, "not_pulled": []}}),
    )
    listing = introspection.read_pulls(body)
    assert [(one.user_id, one.provider, one.resource, one.status) for one in listing.rows] == [
        ("u1", "garmin", "sleep", "pulled"),
        ("u1", "garmin", "steps", "not pulled"),
        ("u1", "garmin", "brain_waves", "not pulled"),
        ("u3", "oura", "brain_waves", "pulled"),
    ]
    assert listing.users == ("u1", "u2", "u3")


# Supplies


def test_the_public_example_of_resources_is_read() -> None:
    """Breaks if the page that the public document shows, without any cursor, is refused."""
    oldest = datetime(2023, 6, 21, tzinfo=UTC)
    expected = Listing((ResourceCoverage("u1", "fitbit", "activity", oldest, OCTOBER),), ("u1",), None)
    assert introspection.read_coverage(raw(PUBLIC_RESOURCES)) == expected


@each(
    (STATISTICS, datetime(2023, 6, 21, tzinfo=UTC), OCTOBER),
    ({"oldest_data": None, "newest_data": None, "sent_count": None, "last_attempt": None}, None, None),
    ({}, None, None),
    ({"newest_data": "2023-10-24T02:00:00+02:00"}, None, OCTOBER),
)
def test_between_which_moments_there_is_something(
    statistics: dict[str, Any], oldest: datetime | None, newest: datetime | None
) -> None:
    """Breaks if a resource of which there is nothing yet, or with a wrong moment, costs the whole page."""
    listing = introspection.read_coverage(page(("u1", {"Fitbit": {"brain_waves": statistics}})))
    assert listing.rows == (ResourceCoverage("u1", "fitbit", "brain_waves", oldest, newest),)


# Pages


@each(
    ({}, None),
    ({"next_cursor": None, "next": None}, None),
    ({"next_cursor": "", "next": ""}, None),
    ({"next_cursor": "None"}, None),
    ({"next": "None"}, None),
    ({"next_cursor": "abc"}, "abc"),
    ({"next": "abc"}, "abc"),
    ({"next_cursor": None, "next": "abc"}, "abc"),
    ({"next_cursor": "", "next": "abc"}, "abc"),
    ({"next_cursor": "abc", "next": "older"}, "abc"),
    ({"next_cursor": "none"}, "none"),
    ({"next_cursor": 7}, "7"),
    ({"next_cursor": False}, None),
    ({"next_cursor": False, "next": "abc"}, "abc"),
)
def test_only_the_cursor_decides_whether_there_is_another_page(given: Any, cursor: str | None) -> None:
    """Breaks if a short or an empty page ends the comparison, or an invalid cursor is followed."""
    for users in ((), (("u1", {}),)):
        for read in (introspection.read_pulls, introspection.read_coverage):
            listing = read(page(*users, **given))
            assert (listing.cursor, listing.rows) == (cursor, ())
            assert listing.users == tuple(user for user, _ in users)


@each(
    *MALFORMED,
    b"<html>",
    b'{"data": [{"user_id": "u1", "provider": {"fitbit"',
    b'{"data": {"user_id": "u1"}}',
    b'\xff{"data": []}',
)
def test_an_invalid_page_is_rejected(body: bytes) -> None:
    """Breaks if half an answer counts as a whole one, ends a worker, or its values get into an error's text."""
    for read in (introspection.read_pulls, introspection.read_coverage):
        refusal(read, body)


@each([], ["canary"], {}, {"canary": 1}, True)
def test_a_cursor_of_another_form_costs_the_later_pages_only(cursor: Any) -> None:
    """Breaks if a cursor costs the users before it, or nobody learns that users are left out."""
    listing = introspection.read_pulls(raw({"data": [WHOLE], "next_cursor": cursor}))
    assert (len(listing.rows), listing.users, listing.cursor, listing.unread) == (1, ("whole",), None, 1)


def test_a_page_of_null_is_empty() -> None:
    """Breaks if an answer without users stops the comparison."""
    for read in (introspection.read_pulls, introspection.read_coverage):
        assert read(b'{"data": null, "next_cursor": "more"}') == Listing((), (), "more")


@each(rb"\ud800", rb"\u0000", b"\xff")
def test_characters_that_cannot_be_stored_cost_nothing(character: bytes) -> None:
    """Breaks if one such character in one user's text ends the comparison of all users."""
    provider, odd = "fit?bit", PULLED | {"error_details": "lost?"}
    given = page(("u?", {provider: {"pulled": {"sleep": odd}}})).replace(b"?", character)
    (found,) = introspection.read_pulls(given).rows
    assert (found.user_id, found.provider, found.status_text) == ("u\ufffd", "fit\ufffdbit", "success, lost\ufffd")
    (covered,) = introspection.read_coverage(page(("u?", {provider: {"sleep": {}}})).replace(b"?", character)).rows
    assert (covered.user_id, covered.provider) == ("u\ufffd", "fit\ufffdbit")
    broken = {"slug": provider, "status": "error", "error_details": {"error_type": "lost?"}}
    (connection,) = connections(broken, character=character)
    assert (connection.provider, connection.error) == ("fit\ufffdbit", "lost\ufffd")
    assert introspection.read_refresh(b'{"error": "no%b"}' % character).error == "no\ufffd"
    assert introspection.read_zone(b'{"fallback_time_zone": {"id": "no%b"}}' % character) == "no\ufffd"


def test_a_literal_that_is_not_json_costs_nothing() -> None:
    """Breaks if one number as Python's json.dumps writes it ends the comparison of all users."""
    body = page(("u1", {"fitbit": {"pulled": {"sleep": PULLED | {"progress": "?"}}}})).replace(b'"?"', b"NaN")
    assert [one.resource for one in introspection.read_pulls(body).rows] == ["sleep"]


WHOLE = {"user_id": "whole", "provider": {"fitbit": {"pulled": {"activity": PULLED}, "not_pulled": []}}}


@each(
    None,
    7,
    "u1",
    [],
    {},
    {"provider": {}},
    *({"user_id": user_id, "provider": {}} for user_id in (None, 7, "", ["u1"], "u" * 257)),
    *({"user_id": "u1", "provider": provider} for provider in (None, [], "fitbit", 7)),
    *({"user_id": "u1", "provider": {"fitbit": one}} for one in (None, [], "canary", 7, {"pulled": None})),
    {"user_id": "u1", "provider": {"": {}}},
    *({"user_id": "u1", "provider": {"fitbit": {"not_pulled": [name]}}} for name in (None, 7, "", {})),
)
def test_an_odd_entry_of_a_page_of_pulls_costs_itself(odd: Any) -> None:
    """Breaks if one entry of another form stops the comparison of all users, or passes uncounted."""
    listing = introspection.read_pulls(raw({"data": [odd, WHOLE], "next_cursor": "more"}))
    assert [(one.user_id, one.resource) for one in listing.rows] == [("whole", "activity")]
    assert (listing.cursor, listing.unread, listing.users[-1]) == ("more", 1, "whole")


@each(
    None,
    [],
    "success",
    *(PULLED | {"status": status} for status in (None, 7, "", "SUCCESS", "thinking_about_it", {})),
    *(PULLED | {"error_details": details} for details in ({"type": "new"}, [], 7)),
    *(PULLED | {"range_start": moment} for moment in ("yesterday", 17, {"at": "never"}, [], "2023-13-01")),
    PULLED | {"range_end": "0000-00-00T00:00:00Z"},
    *(PULLED | {"timeline": timeline} for timeline in ({"started_at": "soon"}, "2023-10-24", [])),
    *(PULLED | {"days_with_data": days} for days in ("seventy", {}, [70])),
    {name: value for name, value in PULLED.items() if name != "status"},
)
def test_an_odd_pull_costs_itself(odd: Any) -> None:
    """Breaks if a null, a type or a value that is new in one pull stops the comparison, or passes uncounted."""
    pulls = {"sleep": odd, "activity": PULLED}
    listing = introspection.read_pulls(page(("u1", {"fitbit": {"pulled": pulls, "not_pulled": ["steps"]}})))
    assert [(one.resource, one.status) for one in listing.rows] == [("activity", "pulled"), ("steps", "not pulled")]
    assert (listing.users, listing.unread) == (("u1",), 1)


@each(
    *(None, [], "canary", 7),
    *({"oldest_data": moment} for moment in ("long ago", 5, [], {}, True)),
    *({"newest_data": moment} for moment in ("soon", "2023-02-30T00:00:00Z")),
)
def test_an_odd_entry_of_a_page_of_resources_costs_itself(odd: Any) -> None:
    """Breaks if a null, a list or a time that is none in one resource stops the comparison, or passes uncounted."""
    given = {"fitbit": {"sleep": odd, "activity": STATISTICS}, "oura": {"steps": STATISTICS}}
    listing = introspection.read_coverage(page(("u1", given), ("u2", {"oura": {"steps": STATISTICS}})))
    rows = [(one.user_id, one.provider, one.resource) for one in listing.rows]
    assert rows == [("u1", "fitbit", "activity"), ("u1", "oura", "steps"), ("u2", "oura", "steps")]
    assert (listing.users, listing.unread) == (("u1", "u2"), 1)


def test_a_user_id_in_capitals_is_the_same_user() -> None:
    """Breaks if a UUID in capitals is compared with the data of nobody."""
    user_id = "1449752E-0D8A-40E0-9206-91AB099B2537"
    assert introspection.read_coverage(page((user_id, {}))).users == (user_id.lower(),)


# Connections


def connections(*given: Any, character: bytes = b"?") -> list[Any]:
    """The connections in an answer about u1, in which `character` replaces every question mark."""
    body = raw({"providers": list(given)}).replace(b"?", character)
    listing = introspection.read_connections("u1", body, ASKED_AT)
    assert (listing.users, listing.unread) == (("u1",), 0)
    return list(listing.rows)


def test_the_public_example_of_a_connection_is_read() -> None:
    """Breaks if the reason of a broken connection is lost."""
    error = "deregistered_per_provider: The user has deregistered the connection per notification from Garmin."
    grants = Grants("u1", "garmin", (("sleep", True),), ASKED_AT)
    assert connections(PUBLIC_CONNECTION) == [Connection("u1", "garmin", "error", error, ASKED_AT), grants]


@each(
    ({"status": "connected"}, "connected", None),
    ({"status": "connected", "error_details": None}, "connected", None),
    ({"status": "connected", "error_details": {"error_type": "an_old_one"}}, "connected", None),
    ({}, "connected", None),
    ({"status": "error"}, "error", "unknown"),
    ({"status": "error", "error_details": None}, "error", "unknown"),
    ({"status": "error", "error_details": {}}, "error", "unknown"),
    ({"status": "error", "error_details": {"error_type": "t"}}, "error", "t"),
    ({"status": "error", "error_details": {"error_message": "m"}}, "error", "m"),
    ({"status": "error", "error_details": {"error_type": "t", "error_message": "m"}}, "error", "t: m"),
    ({"status": "error", "error_details": {"error_type": "", "error_message": ""}}, "error", "unknown"),
)
def test_every_form_of_a_connection(given: Any, status: Any, error: Any) -> None:
    """Breaks if a connection that is broken passes as well, or a well one shows an error that is over."""
    (found,) = connections({"slug": "OURA", "name": "Oura", "external_user_id": "a@b.c"} | given)
    assert (found.provider, found.status, found.error, found.version) == ("oura", status, error, ASKED_AT)


def test_a_user_may_have_no_connection() -> None:
    """Breaks if a person without connections is an error."""
    assert connections() == []


@each(
    *MALFORMED,
    *(b'{"providers": {"slug": "oura"}}', b'{"detail": []}', b'{"data": []}'),
)
def test_an_invalid_list_of_connections_is_rejected(body: bytes) -> None:
    """Breaks if half an answer, or one of another form, ends all connections of a user."""
    refusal(introspection.read_connections, "u1", body, ASKED_AT)


@each(
    *(None, 7, "oura", [], {}, {"status": "error"}),
    *({"slug": slug} for slug in (None, 7, "", {})),
    *({"slug": "oura", "status": status} for status in (None, 1, "paused", {})),
    *({"slug": "oura", "status": "error", "error_details": details} for details in ("expired", [], 7)),
    {"slug": "oura", "status": "error", "error_details": {"error_type": {"code": 1}}},
)
def test_an_odd_connection_costs_itself(odd: Any) -> None:
    """Breaks if one entry of another form hides the user's other connections, or passes uncounted."""
    listing = introspection.read_connections("u1", raw({"providers": [odd, {"slug": "garmin"}]}), ASKED_AT)
    assert listing == Listing((Connection("u1", "garmin", "connected", None, ASKED_AT),), ("u1",), None, 1)


def test_connections_of_null_end_no_connection() -> None:
    """Breaks if a null is taken for the answer that the user has no connection, or stops the comparison."""
    assert introspection.read_connections("u1", b'{"providers": null}', ASKED_AT) == Listing((), ("u1",), unread=1)


@each(({"id": "Europe/Berlin"}, "Europe/Berlin"), *((odd, "") for odd in (None, {}, {"id": None}, {"id": []}, "x", 7)))
def test_the_fallback_zone_of_a_user(given: Any, zone: str) -> None:
    """Breaks if a zone of another form is asked for again and again, while the other users wait."""
    assert introspection.read_zone(raw({"user_id": "u1", "fallback_time_zone": given})) == zone


# Refresh

WITHINGS = ("withings/workouts", "withings/vitals/blood_pressure")
GOING_ON = REFRESHED | {"in_progress_sources": ["oura/hrv"], "refreshed_sources": []}


@each(
    (REFRESHED, Refreshed(WITHINGS, (), ("oura/sleep",), None)),
    (GOING_ON, Refreshed((), ("oura/hrv",), ("oura/sleep",), None)),
    (REFUSED, Refreshed((), (), (), "user has no connected sources")),
    ({"success": True}, Refreshed((), (), (), None)),
)
def test_the_result_of_a_refresh(body: dict[str, Any], read: Refreshed) -> None:
    """Breaks if a running refresh, a partly failed one, or a refusal counts as a success."""
    assert introspection.read_refresh(raw(body)) == read


@each(b"", b"[]", b"<html>", b'{"refreshed_sources": null}', b'{"failed_sources": [7]}')
def test_an_invalid_response_to_a_refresh_is_rejected(body: bytes) -> None:
    """Breaks if half an answer passes as a refresh of nothing."""
    refusal(introspection.read_refresh, body)


def test_a_moment_without_an_offset_is_utc() -> None:
    """Breaks if a range is shifted by the time zone of the machine, or an offset is dropped."""
    found = pull({"range_start": "2023-07-24T00:00:00", "range_end": "2023-10-24T00:00:00-05:00"})
    assert found.start == JULY
    assert found.end == OCTOBER + timedelta(hours=5)
    assert found.end.astimezone(timezone(timedelta(hours=-5))).hour == 0
