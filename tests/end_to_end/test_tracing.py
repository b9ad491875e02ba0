"""Traces of a running stack, as a real collector gets them: a delivery followed from its request to what it set off."""

from collections.abc import Iterator

import httpx
import msgspec
import pytest

from tests.bench.stack import running_up
from tests.support import event, signed, until
from tests.support.collector import Collector, Seen, collector

pytestmark = [pytest.mark.services, pytest.mark.stack]
USER = "somebody-who-is-nobodys-business"
FETCHED = "headrace.fetch backfill"


@pytest.fixture
def found() -> Iterator[Collector]:
    """Everything that a stack with its end has sent, to which history was announced once."""
    notice = event("historical.data.sleep.created", USER, {"user_id": USER, "provider": "oura", "is_final": True})
    body = msgspec.json.encode(notice)
    with collector() as collected:
        # An address at which nobody answers: what is asked is traced all the same.
        key = {"JUNCTION_API_KEY": "sk_us_nobody", "JUNCTION_BASE_URL": "http://127.0.0.1:1"}
        environment = key | {"OTEL_EXPORTER_OTLP_ENDPOINT": collected.url, "OTEL_BSP_SCHEDULE_DELAY": "3600000"}
        with running_up("--workers", "1", environment=environment) as stack:
            headers = signed(body, name="msg_followed", secret=stack["junction_webhook_secret"])
            answer = httpx.post(f"{stack['web']}/webhooks/junction", content=body, headers=headers, timeout=20)
            assert answer.status_code == 202
            ends = ('headrace_requests_total{aggregator="junction",status="none"}', 'SUCCESS",task="headrace.sweep"}')
            until(lambda: all(end in httpx.get(f"{stack['web']}/metrics", timeout=20).text for end in ends))
        yield collected


def after(found: Collector, one: Seen) -> list[Seen]:
    """What links to a span."""
    return [other for other in found.spans if one.id in other.links]


def below(found: Collector, one: Seen) -> list[Seen]:
    """The parts of a span, theirs as well."""
    parts = [other for other in found.spans if other.parent == one.id]
    return parts + [deeper for part in parts for deeper in below(found, part)]


def test_a_delivery_is_followed_to_what_it_set_off(found: Collector) -> None:
    """Breaks if a process is not traced, does not send what it has when it ends, or the thread is lost between two."""
    (request,) = found.named("POST /webhooks/junction")
    assert (request.service, request.kind, request.parent) == ("headrace-web", "SERVER", "")
    assert request.attributes["headrace.delivery"] == "msg_followed"
    assert request.attributes["http.response.status_code"] == 202
    (message,) = after(found, request)
    assert (message.service, message.name, message.kind) == ("headrace-web", "publish live", "PRODUCER")
    (applied,) = after(found, message)
    assert (applied.service, applied.name, applied.kind) == ("headrace-live", "headrace.apply live", "CONSUMER")
    assert {one.name for one in below(found, applied)} == {"open", "commit", "merge", "settle"}
    (opened,) = (one for one in below(found, applied) if one.name == "open")
    assert opened.attributes["headrace.delivery"] == "msg_followed"
    assert len({request.trace, message.trace, applied.trace}) == 3
    fetched = [one for one in after(found, applied) if one.name == FETCHED]
    assert [one.service for one in fetched] == ["headrace-backfill"]
    (asked,) = (one for one in below(found, fetched[0]) if one.name == "GET")
    assert (asked.attributes["error.type"], asked.is_error, asked.attributes["headrace.provider"]) == (
        "no_answer",
        True,
        "oura",
    )
    assert {one.service for one in found.spans} == {
        f"headrace-{name}" for name in ("web", "live", "backfill", "maintenance")
    }
    assert not any(USER.encode() in raw for raw in found.raw)
