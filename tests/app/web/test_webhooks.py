"""The routes: answers and published deliveries."""

import base64
import hashlib
import hmac
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import PublishFailed
from app.observability import metrics
from app.sealing import Sealer
from app.web.app import create_app
from app.web.batcher import Batcher
from app.web.publishing import BlockingPublish, in_thread
from tests.support import ENCRYPTION_KEY, JUNCTION_SECRET, TERRA_SECRET, signed, workout
from tests.support.rsgi import SLASHED
from tests.support.terra import terra_signed

BODY = json.dumps(workout("u1")).encode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"another-secret-of-tests").decode()
FUZZ = hypothesis_settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def nothing_wrong() -> None:
    """A broker that accepts messages."""


def endpoint(settings: Settings, publish: BlockingPublish, ready: Callable[[], None]) -> Flask:
    """The endpoint with a given publish function."""
    return create_app(settings, Batcher(settings, in_thread(publish)), ready)


@pytest.fixture
def taken() -> list[Delivery]:
    """The published deliveries."""
    return []


@pytest.fixture
def client(plain_settings: Settings, taken: list[Delivery]) -> FlaskClient:
    """The endpoint, which publishes to a list."""
    return endpoint(plain_settings, taken.extend, nothing_wrong).test_client()


def svix_signature(body: bytes, name: str, seconds: int, secret: str = JUNCTION_SECRET) -> str:
    """A Svix signature over these bytes."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    text = f"{name}.{seconds}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0


@pytest.mark.parametrize(("route", "sign"), [("junction", signed), ("terra", terra_signed)])
def test_a_signed_webhook_is_published_and_answered_202(
    client: FlaskClient, taken: list[Delivery], route: str, sign: Callable[[bytes], dict[str, str]]
) -> None:
    """Breaks if a valid webhook is rejected, or its body or id changes."""
    answer = client.post(f"/webhooks/{route}", data=BODY, headers=sign(BODY))
    assert (answer.status_code, answer.data) == (202, b"")
    (delivery,) = taken
    assert delivery.aggregator == route
    assert delivery.message_id == {"junction": "msg_1", "terra": "trace-1"}[route]
    assert b"garmin" not in delivery.sealed
    assert delivery.open(Sealer([ENCRYPTION_KEY])) == BODY


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded", ""])
def test_the_content_type_does_not_matter(client: FlaskClient, taken: list[Delivery], content_type: str) -> None:
    """Breaks if the framework consumes the body before the verification."""
    answer = client.post("/webhooks/junction", data=b"a=b&c", headers=signed(b"a=b&c"), content_type=content_type)
    assert (answer.status_code, len(taken)) == (202, 1)


@pytest.mark.parametrize("names", [("webhook-id", "webhook-timestamp", "webhook-signature"), ("SVIX-ID",) * 3])
def test_header_names_may_be_of_the_standard_and_of_any_case(client: FlaskClient, names: tuple[str, ...]) -> None:
    """Breaks if another spelling of the headers is rejected."""
    given = signed(BODY)
    renamed = (
        zip(names, given.values(), strict=True)
        if names[0] == "webhook-id"
        else ((n.upper(), v) for n, v in given.items())
    )
    assert client.post("/webhooks/junction", data=BODY, headers=dict(renamed)).status_code == 202


def hostile() -> dict[str, dict[str, str]]:
    """Headers that must be rejected."""
    now, valid = datetime.now(UTC), signed(BODY)["svix-signature"]

    def timestamp(text: str) -> dict[str, str]:
        return signed(BODY) | {"svix-timestamp": text}

    def signature(text: str) -> dict[str, str]:
        return signed(BODY) | {"svix-signature": text}

    return {
        "no headers": {},
        "no id": {name: value for name, value in signed(BODY).items() if name != "svix-id"},
        "no timestamp": {name: value for name, value in signed(BODY).items() if name != "svix-timestamp"},
        "no signature": {name: value for name, value in signed(BODY).items() if name != "svix-signature"},
        "wrong secret": signed(BODY, secret=OTHER_SECRET),
        "stale": signed(BODY, at=now - timedelta(hours=1)),
        "a little stale": signed(BODY, at=now - timedelta(minutes=6)),
        "future": signed(BODY, at=now + timedelta(hours=1)),
        "timestamp not a number": timestamp("soon"),
        "timestamp nan": timestamp("nan"),
        "timestamp infinite": timestamp("1e400"),
        "timestamp minus infinite": timestamp("-inf"),
        "timestamp of 5000 digits": timestamp("9" * 5000),
        "timestamp of 400 digits": timestamp("9" * 400),
        "timestamp of the year 9999": timestamp("253402300799"),
        "timestamp before all": timestamp("-99999999999"),
        "timestamp empty": timestamp(""),
        "timestamp of another script": timestamp("\u00b9\u00b2\u00b3"),
        "no comma": signature("v1"),
        "two commas": signature("v1,a,b"),
        "bad base64": signature("v1,%%%=="),
        "one letter of base64": signature("v1,a"),
        "other version only": signature("v2," + valid[3:]),
        "asymmetric only": signature("v1a," + valid[3:]),
        "empty": signature(""),
        "blank": signature(" "),
        "of another id": signed(BODY, name="msg_2") | {"svix-id": "msg_1"},
        "of an empty body": signed(b""),
        "of a re-serialised body": signed(json.dumps(json.loads(BODY), indent=1).encode()),
        "latin-1": signature("v1,\xe9\xe9"),
        "latin-1 id": signed(BODY) | {"svix-id": "msg_\xe9"},
        "an id of 300 letters": signed(BODY, name="m" * 300),
        "20,000 signatures": signature(" ".join(["v1," + "A" * 43 + "="] * 20_000)),
        "every header twice": {name: f"{value},{value}" for name, value in signed(BODY).items()},
    }


@pytest.mark.parametrize("case", hostile())
def test_hostile_headers_are_refused(client: FlaskClient, taken: list[Delivery], case: str) -> None:
    """Breaks if a forgery is accepted or causes an error."""
    answer = client.post("/webhooks/junction", data=BODY, headers=hostile()[case])
    assert (answer.status_code, answer.data, taken) == (401, b"signature refused\n", [])


@pytest.mark.parametrize("body", [b"", b"\xff\xfe{}", BODY + b" ", BODY[:-1], b"\x00" * 100])
def test_another_body_is_refused(client: FlaskClient, taken: list[Delivery], body: bytes) -> None:
    """Breaks if the signature is not verified over the received bytes."""
    assert client.post("/webhooks/junction", data=body, headers=signed(BODY)).status_code == 401
    assert client.post("/webhooks/terra", data=body, headers=terra_signed(BODY)).status_code == 401
    assert taken == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Terra-Signature": ""},
        {"X-Terra-Signature": f"t={int(datetime.now(UTC).timestamp())},v1={'0' * 64}"},
        {"terra-signature": "=,,=v1"},
        {"terra-signature": "t=,v1="},
        {"terra-signature": "t=" + "9" * 5000 + ",v1=00"},
        {"terra-signature": "t=1,t=2,v1=00"},
        {"terra-signature": "t=\u00b2,v1=\u00e9"},
        {"terra-signature": "v1=" * 20_000},
        signed(BODY),
    ],
)
def test_hostile_headers_to_terra_are_refused(client: FlaskClient, taken: list[Delivery], headers: dict) -> None:
    """Breaks if a forgery is accepted or causes an error."""
    assert client.post("/webhooks/terra", data=BODY, headers=headers).status_code == 401
    assert taken == []


def test_any_of_several_secrets_is_accepted(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if the events of a second endpoint or of a rotation are rejected."""
    settings = replace(
        plain_settings,
        junction_webhook_secrets=(OTHER_SECRET, JUNCTION_SECRET),
        terra_signing_secrets=("another-of-terra", TERRA_SECRET),
    )
    client = endpoint(settings, taken.extend, nothing_wrong).test_client()
    for secret in settings.junction_webhook_secrets:
        assert client.post("/webhooks/junction", data=BODY, headers=signed(BODY, secret=secret)).status_code == 202
    for secret in settings.terra_signing_secrets:
        assert client.post("/webhooks/terra", data=BODY, headers=terra_signed(BODY, secret=secret)).status_code == 202
    assert len(taken) == 4


@pytest.mark.parametrize("other", ["v1,AAAA", "v2,!!!", "v1a,x", "v1," + "A" * 43 + "="])
@pytest.mark.parametrize("first", [True, False])
def test_any_of_several_signatures_is_accepted(client: FlaskClient, other: str, *, first: bool) -> None:
    """Breaks if events are rejected during a rotation, or because of an additional signature scheme."""
    headers = signed(BODY)
    pair = [headers["svix-signature"], other]
    headers["svix-signature"] = " ".join(pair if first else reversed(pair))
    assert client.post("/webhooks/junction", data=BODY, headers=headers).status_code == 202


@pytest.mark.parametrize("route", ["junction", "terra"])
def test_without_a_secret_everything_is_refused(plain_settings: Settings, taken: list[Delivery], route: str) -> None:
    """Breaks if an aggregator without a secret accepts unsigned requests."""
    settings = replace(plain_settings, junction_webhook_secrets=(), terra_signing_secrets=())
    client = endpoint(settings, taken.extend, nothing_wrong).test_client()
    for headers in ({}, signed(BODY), terra_signed(BODY), terra_signed(BODY, secret="")):
        assert client.post(f"/webhooks/{route}", data=BODY, headers=headers).status_code == 401
    assert taken == []


@pytest.mark.parametrize(
    "body",
    [
        b"hello", b"", b'{"event_type":', b'"hello"', b"[]", b"1", b"null", b"NaN", b"[" * 100_000, b"\x00",
        b'{"a":"\\ud800"}', b'{"a":1,"a":2}', '{"a":"\u00e9\U0001f600"}'.encode(),
    ],
)  # fmt: skip
def test_any_signed_body_is_accepted(client: FlaskClient, taken: list[Delivery], body: bytes) -> None:
    """Breaks if a signed but unusable body is rejected, so that the sender retries eight times."""
    assert client.post("/webhooks/junction", data=body, headers=signed(body)).status_code == 202
    assert taken[0].open(Sealer([ENCRYPTION_KEY])) == body


def test_a_signed_body_that_is_not_utf8_is_accepted(client: FlaskClient, taken: list[Delivery]) -> None:
    """Breaks if bytes that the signature library cannot decode cause an error."""
    seconds, body = int(datetime.now(UTC).timestamp()), b'{"event_type":"\xff\xfe"}'
    headers = {
        "svix-id": "msg_1",
        "svix-timestamp": str(seconds),
        "svix-signature": svix_signature(body, "msg_1", seconds),
    }
    assert client.post("/webhooks/junction", data=body, headers=headers).status_code == 401
    assert client.post("/webhooks/terra", data=body, headers=terra_signed(body)).status_code == 202


CHUNKED = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}


@pytest.mark.parametrize(
    ("environment", "size", "status"),
    [
        ({}, 500, 202),
        ({}, 1000, 202),
        ({}, 1001, 413),
        ({}, 50_000, 413),
        (CHUNKED, 500, 202),
        (CHUNKED, 1000, 202),
        pytest.param(CHUNKED, 1001, 413),
        pytest.param(CHUNKED, 50_000, 413),
    ],
)
def test_a_body_over_the_limit_is_413(
    plain_settings: Settings, taken: list[Delivery], environment: dict[str, Any], size: int, status: int
) -> None:
    """Breaks if a body over the limit is accepted, or one of exactly the limit rejected."""
    client = endpoint(replace(plain_settings, max_body_bytes=1000), taken.extend, nothing_wrong).test_client()
    body = b"x" * size
    answer = client.post(
        "/webhooks/junction", input_stream=io.BytesIO(body), headers=signed(body), environ_overrides=environment
    )
    assert answer.status_code == status
    assert len(taken) == (status == 202)


def test_a_body_over_the_limit_is_not_read(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if a body is read although its declared length is too large."""
    client = endpoint(replace(plain_settings, max_body_bytes=1000), taken.extend, nothing_wrong).test_client()
    stream = io.BytesIO(b"x" * 10**6)
    assert client.post("/webhooks/junction", input_stream=stream, headers=signed(b"")).status_code == 413
    assert stream.tell() == 0


class Unreadable(io.RawIOBase):
    """A request body that fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def readinto(self, _: Any) -> int:
        raise self.error

    def readable(self) -> bool:
        return True


@pytest.mark.parametrize("error", [OSError("canary"), ZeroDivisionError("canary"), TimeoutError("canary")])
def test_an_unexpected_error_is_503_and_its_text_is_not_logged(
    client: FlaskClient, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """Breaks if an unexpected error is a 500, or its text, which may quote a body, is logged or returned."""
    answer = client.post("/webhooks/junction", environ_overrides={"wsgi.input": Unreadable(error), **CHUNKED})
    assert (answer.status_code, answer.data, answer.headers["Retry-After"]) == (503, b"try again\n", "5")
    assert "unexpected" in caplog.text
    assert "canary" not in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [PublishFailed("canary"), ZeroDivisionError("canary"), OSError("canary")])
@pytest.mark.parametrize(("route", "sign"), [("junction", signed), ("terra", terra_signed)])
def test_an_unpublished_delivery_is_503(
    plain_settings: Settings,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    route: str,
    sign: Callable[[bytes], dict[str, str]],
) -> None:
    """Breaks if a delivery that is not published is answered otherwise than by a 503 with Retry-After."""

    def publish(_: Sequence[Delivery]) -> None:
        raise error

    before = set(threading.enumerate())
    client = endpoint(plain_settings, publish, nothing_wrong).test_client()
    answer = client.post(f"/webhooks/{route}", data=BODY, headers=sign(BODY))
    for thread in set(threading.enumerate()) - before:
        thread.join(0.5)  # if it dies of this, then here and not in another test
    assert (answer.status_code, answer.data, answer.headers["Retry-After"]) == (503, b"try again\n", "5")
    assert "canary" not in caplog.text


def test_a_broker_that_hangs_is_503(plain_settings: Settings) -> None:
    """Breaks if a request blocks as long as the broker."""
    released = threading.Event()
    settings = replace(plain_settings, enqueue_deadline_seconds=0.2)
    client = endpoint(settings, lambda _: released.wait(20) and None, nothing_wrong).test_client()
    for _ in range(3):
        answer = client.post("/webhooks/junction", data=BODY, headers=signed(BODY))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    released.set()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/livez", 200),
        ("GET", "/readyz", 200),
        ("GET", "/metrics", 404),  # on the operations port only
        ("GET", "/", 404),
        ("GET", "/webhooks/junction", 405),
        ("PUT", "/webhooks/junction", 405),
        ("DELETE", "/webhooks/terra", 405),
        ("POST", "/webhooks/nobody", 404),
        ("GET", "/webhooks/junction/", 405),
        ("POST", "/webhooks/nobody/", 404),
        ("POST", "/webhooks", 404),
        ("POST", "/webhooks/", 404),
        ("POST", "/webhooks/junction/x", 404),
        ("POST", "/webhooks/./junction", 404),
        ("POST", "/livez/", 404),
        ("POST", "/livez", 405),
    ],
)
def test_other_routes(client: FlaskClient, taken: list[Delivery], method: str, path: str, status: int) -> None:
    """Breaks if a probe fails, or an unknown path is answered by a server error."""
    assert client.open(path, method=method, data=BODY, headers=signed(BODY)).status_code == status
    assert taken == []


@pytest.mark.parametrize("path", SLASHED)
def test_additional_slashes_are_ignored(client: FlaskClient, taken: list[Delivery], path: str) -> None:
    """Breaks if a sender whose base URL ends with a slash is redirected or refused: senders follow no redirect."""
    answer = client.post("/", data=BODY, headers=signed(BODY), environ_overrides={"PATH_INFO": path})
    assert (answer.status_code, len(taken)) == (202, 1)


def test_readiness_is_denied_when_nothing_could_be_enqueued(
    plain_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Breaks if readiness does not depend on the broker, or liveness does."""
    wrong: list[Exception] = [PublishFailed("the broker cannot be reached"), ZeroDivisionError("canary")]

    def ready() -> None:
        raise wrong[0]

    client = endpoint(plain_settings, lambda _: None, ready).test_client()
    answer = client.get("/readyz")
    assert (answer.status_code, answer.text) == (503, "the broker cannot be reached\n")
    assert client.get("/livez").status_code == 200
    wrong.pop(0)
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "canary" not in answer.text + caplog.text


def test_answers_are_counted(client: FlaskClient) -> None:
    """Breaks if accepted or rejected webhooks are not counted."""
    series = [
        ("headrace_answers_total", {"aggregator": "junction", "status": "202"}),
        ("headrace_answers_total", {"aggregator": "junction", "status": "401"}),
        ("headrace_refused_total", {"aggregator": "junction", "reason": "missing"}),
        ("headrace_refused_total", {"aggregator": "junction", "reason": "stale"}),
        ("headrace_refused_total", {"aggregator": "junction", "reason": "signature"}),
        ("headrace_answer_seconds_count", {"aggregator": "junction"}),
    ]
    before = [counted(name, **labels) for name, labels in series]
    stale = signed(BODY, at=datetime.now(UTC) - timedelta(hours=1))
    for headers in (signed(BODY), {}, stale, signed(BODY, secret=OTHER_SECRET)):
        client.post("/webhooks/junction", data=BODY, headers=headers)
    after = [counted(name, **labels) for name, labels in series]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 3, 1, 1, 1, 4]
    assert 'headrace_answers_total{aggregator="junction",status="202"}' in metrics.exposition().decode()


@pytest.fixture(scope="module")
def ack() -> list[Delivery]:
    """The deliveries that the fuzzed endpoint published."""
    return []


@pytest.fixture(scope="module")
def fuzzed(ack: list[Delivery]) -> Iterator[FlaskClient]:
    settings = Settings(junction_webhook_secrets=(JUNCTION_SECRET,), terra_signing_secrets=(TERRA_SECRET,))
    yield endpoint(settings, ack.extend, nothing_wrong).test_client()
    assert ack == []


LATIN = st.text(st.characters(max_codepoint=255), max_size=60)
NUMBERS = (
    st.integers().map(str)
    | st.floats().map(str)
    | st.integers(-400, 400).map(lambda off: str(int(datetime.now(UTC).timestamp()) + off))
)
TIMESTAMPS = LATIN | NUMBERS
FORGED = st.binary(max_size=40).map(lambda raw: "v1," + base64.b64encode(raw).decode())
SVIX_SIGNATURES = LATIN | st.lists(FORGED | LATIN, max_size=4).map(" ".join)
PAIRS = st.tuples(st.sampled_from(["t", "v1", "v0", "", " t", "T"]), TIMESTAMPS | st.binary(max_size=33).map(bytes.hex))
TERRA_SIGNATURES = LATIN | st.lists(PAIRS, max_size=5).map(lambda pairs: ",".join(f"{a}={b}" for a, b in pairs))


@FUZZ
@given(name=LATIN, timestamp=TIMESTAMPS, signature=SVIX_SIGNATURES, body=st.binary(max_size=30))
@example(name="msg_1", timestamp="1", signature="v1," + "A" * 43 + "=", body=b"")
def test_no_header_makes_junction_s_route_fail(
    fuzzed: FlaskClient, name: str, timestamp: str, signature: str, body: bytes
) -> None:
    """Breaks if a random header passes as a signature or is answered otherwise than by 401."""
    headers = {"HTTP_SVIX_ID": name, "HTTP_SVIX_TIMESTAMP": timestamp, "HTTP_SVIX_SIGNATURE": signature}
    assert fuzzed.post("/webhooks/junction", data=body, environ_overrides=headers).status_code == 401


@FUZZ
@given(signature=TERRA_SIGNATURES, old=TERRA_SIGNATURES, trace=LATIN, body=st.binary(max_size=30))
def test_no_header_makes_terra_s_route_fail(
    fuzzed: FlaskClient, signature: str, old: str, trace: str, body: bytes
) -> None:
    """Breaks if a random header passes as a signature or is answered otherwise than by 401."""
    headers = {
        "HTTP_X_TERRA_SIGNATURE": signature,
        "HTTP_TERRA_SIGNATURE": old,
        "HTTP_X_TERRA_TRACE_ID": trace,
        "HTTP_X_TERRA_ORDERING_TIMESTAMP": trace,
    }
    assert fuzzed.post("/webhooks/terra", data=body, environ_overrides=headers).status_code == 401


@FUZZ
@given(
    name=st.sampled_from(
        [
            "HTTP_HOST", "CONTENT_TYPE", "CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING", "HTTP_CONTENT_ENCODING",
            "HTTP_EXPECT", "HTTP_RANGE", "HTTP_COOKIE", "HTTP_X_FORWARDED_HOST", "QUERY_STRING", "HTTP_AUTHORIZATION",
            "HTTP_ACCEPT", "HTTP_IF_MATCH",
        ]
    ),
    value=LATIN | NUMBERS,
)  # fmt: skip
def test_no_other_header_makes_a_route_fail(fuzzed: FlaskClient, name: str, value: str) -> None:
    """Breaks if an unrelated header leads to a status that is not in the contract."""
    for route in ("junction", "terra"):
        answer = fuzzed.post(f"/webhooks/{route}", data=b"{}", environ_overrides={name: value})
        assert answer.status_code in (401, 413, 503)
