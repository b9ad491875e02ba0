"""Warnings of `headrace check` about a RabbitMQ cluster, from a simulated management API."""

import http.server
import json
import re
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from app.broker.delays import delay_queue
from app.broker.lanes import LANES
from app.config.settings import Settings
from workers.local.ports import free_port
from workers.operate.check import _cluster
from workers.operate.rabbitmq_cluster import warnings

NODES = ["rabbit@one", "rabbit@two", "rabbit@three"]
QUEUES = [name for lane in LANES for name in (lane, delay_queue(lane).name)]


def answers(version: str = "3.13.7", **changes: Any) -> dict[str, Any]:
    """The answers for a cluster without a fault, with the given fields of each node or queue changed."""
    node = {"running": True, "net_ticktime": 12, "partitions": []}
    queue = {"members": NODES, "arguments": {"x-queue-type": "quorum"}, "effective_policy_definition": []}
    return {
        "/api/nodes": [{"name": name} | node | {k: v for k, v in changes.items() if k in node} for name in NODES],
        "/api/queues/%2F": [
            {"name": name} | queue | {k: v for k, v in changes.items() if k in queue} for name in QUEUES
        ],
        "/api/overview": {"rabbitmq_version": version},
    }


@contextmanager
def management(found: dict[str, Any], login: str = "guest:guest") -> Iterator[str]:
    """The URL of a management API with these answers, which accepts this login."""
    wanted = f"Basic {b64encode(login.encode()).decode()}"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = 401 if self.headers["Authorization"] != wanted else 200 if self.path in found else 404
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(found.get(self.path)).encode() if status == 200 else b"{}")

        def log_message(self, *_: object) -> None:
            """Is not logged."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def settings(
    url: str | None, brokers: str = "amqp://guest:guest@127.0.0.1:1//;amqp://guest:guest@127.0.0.2:1//"
) -> Settings:
    return Settings(broker_url=brokers, broker_management_url=url)


def test_a_correct_cluster_has_no_warning() -> None:
    """Breaks if operators get used to warnings that mean nothing."""
    with management(answers()) as url:
        assert warnings(settings(url)) == []
        (finding,) = _cluster(settings(url))
    assert finding.fine
    assert not finding.is_warning
    assert "pause_minority" in finding.text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (
            answers(members=["rabbit@one", "rabbit@three"]),
            r"no member on rabbit@two .*rabbitmq-queues grow rabbit@two all",
        ),
        (answers(running=False), "does not run"),
        (answers(partitions=["rabbit@two"]), "cluster_partition_handling = pause_minority"),
        (answers(net_ticktime=60), "net_ticktime is 60 s.*net_ticktime = 12"),
        (
            answers(effective_policy_definition={"delivery-limit": 5}),
            "after 5 deliveries: rabbitmqctl set_policy -p / ",
        ),
        (answers(arguments={"x-delivery-limit": 3}, effective_policy_definition={"delivery-limit": -1}), "after 3 "),
        (answers(version="4.0.5"), "after 20 deliveries"),
    ],
    ids=["members", "stopped", "partition", "net_ticktime", "policy", "argument", "RabbitMQ 4"],
)
def test_each_fault_of_a_cluster_is_a_warning(found: dict[str, Any], text: str) -> None:
    """Breaks if a cluster that loses or delays messages passes the check, or the check does not say what to do."""
    with management(found) as url:
        findings = list(_cluster(settings(url)))
    assert all(one.fine and one.is_warning for one in findings)
    assert [one for one in findings if re.search(text, one.text)]


def test_a_policy_without_a_limit_ends_the_warning() -> None:
    """Breaks if the command that a warning names does not correct it."""
    with management(answers(version="4.0.5", effective_policy_definition={"delivery-limit": -1})) as url:
        assert warnings(settings(url)) == []


def test_the_login_is_that_of_the_broker_or_of_the_url() -> None:
    """Breaks if the check uses another login than the broker's, or ignores the one that is set."""
    brokers = "amqp://user%40:pass%2Fword@127.0.0.1:1//"
    with management(answers(), login="user@:pass/word") as url:
        assert warnings(settings(url, brokers)) == []
    with management(answers(), login="monitor:sesame") as url:
        assert warnings(settings(url.replace("//", "//monitor:sesame@"), brokers)) == []


@pytest.mark.parametrize("kind", ["unreachable", "refused", "another API"])
def test_what_could_not_be_checked_is_said_for_several_brokers_only(kind: str) -> None:
    """Breaks if the check of a cluster passes silently, of a single broker warns, or the login is shown."""
    found = answers() if kind == "refused" else {"/api/nodes": {"sesame": 1}}
    with management(found, login="guest:guest" if kind != "refused" else "other:sesame") as there:
        url = f"http://127.0.0.1:{free_port()}" if kind == "unreachable" else there
        (finding,) = _cluster(settings(url))
        assert list(_cluster(settings(url, "amqp://guest:guest@127.0.0.1:1//"))) == []
    assert finding.is_warning
    assert finding.fine
    assert "rabbitmq_management" in finding.text
    assert "HEADRACE_BROKER_MANAGEMENT_URL" in finding.text
    assert "sesame" not in finding.text
    assert "guest" not in finding.text
