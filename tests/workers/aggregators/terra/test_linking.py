"""Terra's widget sessions: the request, and its answers, with the public example."""

import json
from typing import Any

from tests.support.cases import MALFORMED, each, refusal
from workers.aggregators.linking import Link
from workers.aggregators.terra import linking

# The example of the public API document, word for word.
DONE = "https://example.test/done"
PUBLIC_SESSION = {
    "session_id": "23dc2540-7139-44c6-8158-f81196e2cf2e",
    "url": "https://widget.tryterra.co/session/344d475f-296a-489a-a88c-54183671dafd",
    "status": "success",
    "expires_in": 900,
}


@each(
    ((), None, {}),
    (("garmin", "Oura"), None, {"providers": "GARMIN,OURA"}),
    ((), DONE, {"auth_success_redirect_url": DONE, "auth_failure_redirect_url": DONE}),
)
def test_a_session_is_asked_for(providers: tuple[str, ...], redirect_url: str | None, more: dict[str, str]) -> None:
    """Breaks if the person's own id gets lost, or they are offered other providers, or end up elsewhere."""
    request = linking.session_request("member-1", providers, redirect_url)
    assert (request.method, request.path) == ("POST", "/auth/generateWidgetSession")
    assert json.loads(request.body or b"") == {"reference_id": "member-1"} | more


def test_the_public_session_is_read() -> None:
    """Breaks if the address or its time get lost."""
    session = json.dumps(PUBLIC_SESSION).encode()
    assert linking.read_session(session) == Link(PUBLIC_SESSION["url"], PUBLIC_SESSION["session_id"], 900)  # type: ignore[arg-type]
    assert linking.read_session(b'{"url": "https://w.test"}') == Link("https://w.test", "", 900)


@each(*MALFORMED, b'{"status": "error", "message": "canary"}')
def test_an_answer_of_another_form_is_refused(body: bytes) -> None:
    """Breaks if an error, which Terra may send with status 200, counts as a session."""
    refusal(linking.read_session, body)


@each(
    (b'{"type": "about:blank", "title": "unauthorized", "detail": "keys are missing"}', "keys are missing"),
    (b'{"type": "about:blank", "title": "not found", "instance": "/auth"}', "not found"),
    (b'{"type": "about:blank", "title": "not found", "instance": "/auth", "detail": null}', "not found"),
    (b'{"status": "error", "message": "Invalid dev-id"}', "Invalid dev-id"),
    (b"{}", ""),
    (b"<html>", ""),
)
def test_an_error_response_is_one_line(body: Any, said: Any) -> None:
    """Breaks if the reason is lost, in the form of today or in that of 2022."""
    assert linking.read_refusal(body) == said
