"""Junction's users and links: the requests, and their answers, with the public examples."""

import json
from itertools import product
from typing import Any

import pytest

from app.errors import Unprocessable
from tests.support.cases import MALFORMED, each, refusal
from workers.aggregators.junction import linking
from workers.aggregators.linking import Link, one_line
from workers.aggregators.requests import Request

USER = "1449752e-0d8a-40e0-9206-91ab099b2537"
# The examples of the public API document, word for word.
PUBLIC_CONFLICT = {
    "detail": {
        "created_on": "2023-02-27T12:31:24+00:00",
        "error_message": "Client user id already exists.",
        "error_type": "INVALID_REQUEST",
        "user_id": USER,
    }
}
PUBLIC_LINK = {
    "link_token": "dGVzdCB0ZXN0IHRlc3Q=",
    "link_web_url": "https://link.tryvital.io/?token=dGVzdCB0ZXN0IHRlc3Q%3D&env=production&region=us",
}
PUBLIC_DEMO = {"detail": "Connected user 37c9c3fa-49e8-4d60-8cc8-328cba420f30 to provider fitbit", "success": True}


def sent(request: Request) -> tuple[str, str, Any]:
    """Method, path and JSON body."""
    return request.method, request.path, json.loads(request.body) if request.body else None


def test_a_user_is_made_and_found_by_their_name() -> None:
    """Breaks if a user cannot be created, or a name with a slash reaches another path."""
    assert sent(linking.user_request("member-1")) == ("POST", "/v2/user", {"client_user_id": "member-1"})
    assert sent(linking.resolve_request("team/7 ä")) == ("GET", "/v2/user/resolve/team%2F7%20%C3%A4", None)
    assert linking.read_user(json.dumps({"user_id": USER, "client_user_id": "member-1"}).encode()) == USER


@each(
    ((), {}),
    (("Garmin",), {"provider": "garmin"}),
    (("garmin", "OURA"), {"filter_on_providers": ["garmin", "oura"]}),
)
def test_a_link_offers_the_requested_providers(providers: tuple[str, ...], which: dict[str, Any]) -> None:
    """Breaks if a person is offered other providers, or has to choose where there is nothing to choose."""
    assert sent(linking.token_request(USER, providers)) == ("POST", "/v2/link/token", {"user_id": USER} | which)


def test_a_link_leads_back() -> None:
    """Breaks if the person does not come back to the app that sent them."""
    _, _, body = sent(linking.token_request(USER, redirect_url="https://example.test/done"))
    assert body == {"user_id": USER, "redirect_url": "https://example.test/done"}


def test_the_public_link_is_read() -> None:
    """Breaks if the address or its ten minutes get lost."""
    link = linking.read_token(json.dumps(PUBLIC_LINK).encode())
    assert link == Link(PUBLIC_LINK["link_web_url"], PUBLIC_LINK["link_token"], 600)
    assert PUBLIC_LINK["link_token"] not in repr(link).replace(link.url, "")


def test_a_demo_connection_is_asked_for_and_read() -> None:
    """Breaks if a demo that was not made looks like one that was."""
    assert sent(linking.demo_request(USER, "Oura")) == (
        "POST",
        "/v2/link/connect/demo",
        {"user_id": USER, "provider": "oura"},
    )
    linking.read_demo(json.dumps(PUBLIC_DEMO).encode())
    with pytest.raises(Unprocessable, match="no more demo users"):
        linking.read_demo(b'{"success": false, "detail": "no more demo users"}')
    with pytest.raises(Unprocessable, match="not made"):
        linking.read_demo(b'{"success": false}')


@each(*product((linking.read_user, linking.read_token, linking.read_demo), [*MALFORMED, b"<html>", b'{"user_id": 7}']))
def test_an_answer_of_another_form_is_refused(read: Any, body: bytes) -> None:
    """Breaks if an error page ends in a traceback, or counts as an answer."""
    refusal(read, body)


@each(
    (json.dumps(PUBLIC_CONFLICT).encode(), "Client user id already exists."),
    (b'{"detail": "Invalid token"}', "Invalid token"),
    (b'{"detail": [{"loc": ["body", "provider"], "msg": "not one", "type": "enum"}]}', "provider: not one"),
    (b'{"detail": [{"loc": [], "msg": "a"}, {"loc": ["body", "x", 0], "msg": "b"}]}', ": a; x.0: b"),
    (b'{"detail": "two\\nlines\\u001b[31m"}', "two lines [31m"),
    (b'{"detail": 7}', ""),
    (b"{}", ""),
    (b"<html>", ""),
    (b"", ""),
)
def test_an_error_response_is_one_line(body: Any, said: Any) -> None:
    """Breaks if the reason is lost, or writes over the operator's terminal."""
    assert linking.read_refusal(body) == said


def test_a_long_text_is_cut() -> None:
    """Breaks if a whole error page lands on the terminal."""
    assert len(one_line("x" * 10_000)) == 200
