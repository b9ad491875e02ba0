"""Readiness from memory, and the operations port."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import psutil
import pytest

from app.delivery import Delivery
from app.errors import PublishFailed
from app.web import operations, readiness
from app.web.operations import CONCURRENT, OperationsServer
from app.web.publishing import in_thread
from app.web.readiness import FRESH_SECONDS, Readiness
from tests.support import HTTP, JUNCTION_SECRET, program, until
from workers.local.ports import free_port


class Broker:
    """A broker that can be away or frozen, and counts the checks."""

    def __init__(self) -> None:
        self.checks, self.error = 0, ""
        self.running = threading.Event()
        self.running.set()

    def ping(self) -> None:
        self.checks += 1
        self.running.wait(30)
        if self.error:
            raise PublishFailed(self.error)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    """A broker that is checked every 20 ms."""
    monkeypatch.setattr(readiness, "FRESH_SECONDS", 0.02)
    monkeypatch.setattr(readiness, "SLOW_SECONDS", 0.1)
    return Broker()


def started(broker: Broker, *, idle_seconds: float = FRESH_SECONDS) -> Readiness:
    found = Readiness(broker.ping, idle_seconds=idle_seconds)
    found.start()
    return found


def is_ready(found: Readiness) -> bool:
    try:
        found.check()
    except PublishFailed:
        return False
    return True


def test_the_state_follows_the_broker(broker: Broker) -> None:
    """Breaks if a probe reports a broker that has gone, or never one that came back."""
    found = Readiness(broker.ping, idle_seconds=FRESH_SECONDS)
    with pytest.raises(PublishFailed, match="not been checked yet"):
        found.check()
    found.start()
    until(lambda: is_ready(found), 10)
    broker.error = "away"
    until(lambda: not is_ready(found), 10)
    with pytest.raises(PublishFailed, match="away"):
        found.check()
    broker.error = ""
    until(lambda: is_ready(found), 10)


def test_a_frozen_broker_is_not_ready(broker: Broker) -> None:
    """Breaks if the last state stays true while a check hangs."""
    found = started(broker)
    until(lambda: is_ready(found), 10)
    broker.running.clear()
    until(lambda: not is_ready(found), 10)
    broker.running.set()
    until(lambda: is_ready(found), 10)


def test_a_publish_outweighs_a_slow_check(broker: Broker) -> None:
    """Breaks if an endpoint that enqueues is taken out of service because its check has to replace a connection."""
    found = started(broker)
    publish = found.observed(in_thread(lambda _: None))
    until(lambda: is_ready(found), 10)
    broker.running.clear()
    until(lambda: not is_ready(found), 10)
    asyncio.run(publish([]))
    assert is_ready(found)
    broker.error = "too slow"
    broker.running.set()
    until(lambda: not is_ready(found), 10)  # the next check counts again


def test_a_flood_of_probes_does_not_reach_the_broker(broker: Broker) -> None:
    """Breaks if each probe checks the broker: a flood of them would open as many connections to it."""
    found = started(broker)
    until(lambda: is_ready(found), 10)
    before, began = broker.checks, time.monotonic()
    for _ in range(10_000):
        found.check()
    assert broker.checks - before <= (time.monotonic() - began) / 0.02 + 2


def test_an_expensive_check_is_rare_without_probes(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if RabbitMQ logs a connection a second for nothing, or a probe after a pause does not start a check."""
    monkeypatch.setattr(readiness, "IDLE_SECONDS", 0.3)
    found = started(broker, idle_seconds=0.3)
    until(lambda: broker.checks >= 1, 10)
    time.sleep(0.2)
    assert broker.checks == 1
    until(lambda: is_ready(found), 10)
    until(lambda: broker.checks >= 3, 0.25, every=0.01)


def test_a_publish_counts_as_a_check(broker: Broker) -> None:
    """Breaks if a publish that failed leaves the endpoint ready until the next check."""
    found = Readiness(broker.ping, idle_seconds=FRESH_SECONDS)
    wrong: list[Exception] = []

    def publish(_: object) -> None:
        if wrong:
            raise wrong[0]

    observed = found.observed(in_thread(publish))
    deliveries: list[Delivery] = []
    asyncio.run(observed(deliveries))
    assert is_ready(found)
    wrong.append(PublishFailed("full"))
    with pytest.raises(PublishFailed):
        asyncio.run(observed(deliveries))
    assert not is_ready(found)
    assert broker.checks == 0


def test_an_unexpected_error_is_logged_and_the_checks_go_on(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    """Breaks if the thread ends, so that the state never changes again, or the log quotes the error."""

    def fail() -> None:
        raise ZeroDivisionError("canary")

    found = Readiness(fail, idle_seconds=FRESH_SECONDS)
    found.start()
    until(lambda: "unexpected ZeroDivisionError" in caplog.text, 10)
    assert not is_ready(found)
    assert "canary" not in caplog.text
    found._ping = broker.ping
    until(lambda: is_ready(found), 10)


@contextmanager
def serving(check: Callable[[], None]) -> Iterator[str]:
    """The operations port, with a readiness of its own."""
    state = Readiness(check, idle_seconds=FRESH_SECONDS)
    state.start()
    with OperationsServer("127.0.0.1", 0, state) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_operations_port_answers(broker: Broker) -> None:
    """Breaks if a probe or Prometheus gets no answer."""
    with serving(broker.ping) as url:
        assert HTTP.get(f"{url}/livez").text == "up\n"
        until(lambda: HTTP.get(f"{url}/readyz").text == "ready\n", 10)
        assert "headrace_answers_total" in HTTP.get(f"{url}/metrics").text
        assert HTTP.get(f"{url}/webhooks/junction").status_code == 404
        assert HTTP.post(f"{url}/metrics").status_code == 501
        broker.error = "away"
        until(lambda: HTTP.get(f"{url}/readyz").status_code == 503, 10)
        assert HTTP.get(f"{url}/readyz").text == "away\n"
        assert HTTP.get(f"{url}/livez").status_code == 200


def test_idle_connections_to_the_operations_port_are_limited(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if each connection gets a thread without a limit, or keeps it."""
    monkeypatch.setattr(operations._Handler, "timeout", 0.5)
    with serving(broker.ping) as url:
        port = int(url.rpartition(":")[2])
        before = threading.active_count()
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONCURRENT * 4)]
        time.sleep(0.2)
        assert threading.active_count() - before <= CONCURRENT
        until(lambda: threading.active_count() - before <= 1, 10)
        assert HTTP.get(f"{url}/livez").status_code == 200
        for one in idle:
            one.close()


def test_the_process_of_the_port_is_restarted_and_ends_with_its_parent(broker_url: str) -> None:
    """Breaks if the port stays closed after a crash, or a killed endpoint leaves its process and port behind."""
    port = free_port()
    environment = {"BROKER_URL": broker_url, "HEADRACE_OPERATIONS_PORT": str(port), "HEADRACE_PORT": str(free_port())}
    environment |= {
        "JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET,
        "HEADRACE_WEB_PROCESSES": "1",
    }

    def answers() -> bool:
        try:
            return HTTP.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    with program("app.web", **environment) as process:
        until(answers, 30)
        (child,) = [one for one in psutil.Process(process.pid).children() if "app.web.operations" in one.cmdline()]
        child.kill()
        until(lambda: not answers(), 10)
        until(answers, 30)
        children = psutil.Process(process.pid).children()
        process.kill()
        until(lambda: not answers(), 10)
        for one in children:
            if one.is_running():
                one.kill()
