"""Paths of requests: an id, which comes from an event, cannot change the path that is fetched."""

from collections.abc import Callable
from datetime import UTC, datetime

import httpx
import pytest

from app.catalogue import catalogue
from app.errors import Unprocessable
from workers.aggregators import junction, terra
from workers.aggregators.junction import api, introspection, linking
from workers.aggregators.requests import DateRange, Request
from workers.aggregators.terra import admin
from workers.fetch.http import Client

NOW = datetime(2026, 3, 1, tzinfo=UTC)
PART = DateRange(NOW, NOW)
USERS = [one for one in catalogue().values() if "{user_id}" in one.path]
STREAMS = [one for one in catalogue().values() if one.kind == "stream"]
# Every function that puts an id into a request.
IN_A_PATH: dict[str, Callable[[str], Request]] = {
    **{one.name: lambda text, one=one: junction.request(one, text, "", PART) for one in USERS},  # type: ignore[misc]
    **{one.name: lambda text, one=one: api.stream_request(one, text) for one in STREAMS},  # type: ignore[misc]
    "connections": introspection.connections_request,
    "refresh": introspection.refresh_request,
    "resolve": linking.resolve_request,
    "environment": admin.users_request,
}
IN_A_QUERY: dict[str, Callable[[str], Request]] = {
    "pulls": lambda text: introspection.pulls_request(text, text),
    "coverage": lambda text: introspection.coverage_request(text, text),
    "cursor": lambda text: junction.request(USERS[0], "u1", text, PART, text),
    "terra": lambda text: terra.request(catalogue()["sleep"], text, text, PART),
    "events": lambda text: admin.events_request("dev", "events", since=NOW, until=NOW, cursor=text, user_id=text),
    "users": lambda text: admin.users_request("dev", text, text),
}
HOSTILE = (
    *(
        "a/b",
        "../x",
        "a/../../v2/user",
        "/",
        "//evil.example/x",
        "?x=1",
        "a?limit=0",
        "#",
        "a#b",
        "%2e%2e",
        "%2E%2E%2F",
    ),
    *("%00", "..%2f..", "..;", "a;b", "\\..\\x", "...", " ", "a b", "\r\nHost: evil", "\xe9", "\u2024\u2024"),
    *("@evil.example", "http://x/", "{user_id}"),
)


def sent(request: Request) -> httpx.URL:
    """The URL that the client sends this request to."""
    asked: list[httpx.URL] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        return httpx.Response(200)

    Client("https://api.test/base", {}, httpx.MockTransport(answer)).fetch(request)
    return asked[0]


@pytest.mark.parametrize("name", [*IN_A_PATH, *IN_A_QUERY])
def test_an_id_cannot_change_the_path(name: str) -> None:
    """Breaks if an id of an event can read the data of another user, or send the API key's rights to another route."""
    build = (IN_A_PATH | IN_A_QUERY)[name]
    usual = sent(build("ID")).raw_path.partition(b"?")[0]
    assert usual.startswith(b"/base/")
    for text in HOSTILE:
        url = sent(build(text))
        path = url.raw_path.partition(b"?")[0]
        assert url.host == "api.test"
        assert path.count(b"/") == usual.count(b"/")
        if name in IN_A_QUERY:
            assert path == usual
        else:
            before, _, after = usual.partition(b"ID")
            assert path.startswith(before)
            assert path.endswith(after)
            found = path[len(before) : len(path) - len(after)]
            assert found.lower() not in (b".", b"..", b"%2e", b"%2e%2e", b"")
            assert not set(found) & set(b"?#/\\; \r\n")


@pytest.mark.parametrize("name", IN_A_PATH)
@pytest.mark.parametrize("text", ["", ".", ".."])
def test_a_dot_segment_is_refused(name: str, text: str) -> None:
    """Breaks if `..` as an id removes a part of the path: no encoding of dots prevents that."""
    with pytest.raises(Unprocessable, match="cannot be a part of a path"):
        IN_A_PATH[name](text)


def test_every_resource_of_junction_is_tested() -> None:
    """Breaks if a path of the catalogue has an id that the tests above do not replace."""
    paths = {one.name for one in catalogue().values() if "{" in one.path}
    assert paths == {one.name for one in (*USERS, *STREAMS)}
