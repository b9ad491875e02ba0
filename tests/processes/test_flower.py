"""Flower as a process: every page needs the password."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import httpx
import pytest
from flower.urls import handlers
from sqlalchemy import Engine
from tornado.web import StaticFileHandler

from app.broker.celery import make_celery
from app.broker.lanes import APPLY, SWEEP
from app.config.settings import Settings
from tests.support import ROOT, program, until
from tests.support.servers import Servers
from tests.support.workers import SharedWorker
from workers.celery.heartbeats import INTERVAL_SECONDS
from workers.local.ports import free_port

pytestmark = pytest.mark.processes
MAX_TASKS = 5000  # of Flower's history
LONG_TASK_SECONDS = 3.5 * INTERVAL_SECONDS  # less than the lock_timeout that ends the task; measured with 90 s as well
CREDENTIALS = ("tests", "sesame-open-the-door")
PAGES = ["/", "/tasks", "/workers", "/broker", "/metrics", "/api/workers", "/api/tasks", "/api/queues/length"]
PUBLIC_PATHS = ("/healthcheck", "/login", "/logout")


def paths() -> list[str]:
    """One path per handler of Flower: read from its list, so that pages of newer versions are tested too."""
    found = []
    for one in handlers:
        pattern, handler = (one.regex.pattern, one.handler_class) if hasattr(one, "regex") else one[:2]
        path = pattern.removesuffix("$").replace("(.+)", "x").replace("(.*)", "x").removesuffix("/?")
        if handler is not StaticFileHandler and path != ".*" and path not in PUBLIC_PATHS:
            found.append(path)
    return found


def environment(broker_url: str, port: int) -> dict[str, str]:
    """Flower's environment without the password."""
    known = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return known | {"BROKER_URL": broker_url, "HEADRACE_FLOWER_PORT": str(port)}


@pytest.fixture(scope="module")
def flower(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """An HTTP client of a running Flower, without the password."""
    port, log = free_port(), tmp_path_factory.mktemp("flower") / "log"
    variables = environment(servers.broker_url, port) | {"HEADRACE_FLOWER_AUTH": ":".join(CREDENTIALS)}
    with (
        program("workers.cli", "flower", log=log, **variables) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
    ):
        until(lambda: process.poll() is not None or responds(client))
        assert process.poll() is None, log.read_text()
        yield client
    assert ":".join(CREDENTIALS) not in log.read_text()


def responds(client: httpx.Client) -> bool:
    """Whether Flower responds."""
    try:
        return client.get("/healthcheck").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("path", sorted({*PAGES, *paths()}))
def test_every_page_rejects_requests_without_the_password(flower: httpx.Client, path: str) -> None:
    """Breaks if a client can see or stop tasks without a password: Flower leaves some of its pages open."""
    token = "00" * 16  # the XSRF token must not be the only protection
    for auth in (None, (CREDENTIALS[0], "wrong"), ("wrong", CREDENTIALS[1]), ("", "")):
        seen = flower.get(path, auth=auth).status_code
        headers = {"X-Xsrftoken": token, "Cookie": f"_xsrf={token}"}
        done = flower.post(path, auth=auth, headers=headers).status_code
        assert 401 in (seen, done)
        assert {seen, done} <= {401, 405}


@pytest.mark.parametrize("path", PAGES)
def test_every_page_opens_with_the_password(flower: httpx.Client, path: str) -> None:
    """Breaks if the password does not open every page."""
    assert flower.get(path, auth=CREDENTIALS).status_code == 200


def test_the_health_check_needs_no_password_and_shows_only_ok(flower: httpx.Client) -> None:
    """Breaks if the health check needs the password, or its response shows anything else."""
    answer = flower.get("/healthcheck")
    assert (answer.status_code, answer.text) == (200, "OK")


def test_the_login_and_logout_pages_show_no_data(flower: httpx.Client) -> None:
    """Breaks if the two pages of other login methods show data or accept requests."""
    assert flower.get("/login").status_code == 404
    shown = flower.get("/logout").text
    assert not any(part in shown for part in ("redis", "headrace.", "maintenance", CREDENTIALS[1]))
    assert flower.get("/tasks").status_code == 401


def test_an_error_page_shows_no_settings(flower: httpx.Client) -> None:
    """Breaks if an error page shows settings or a traceback."""
    text = flower.get("/no-such-page").text
    assert "Traceback" not in text
    assert "redis://" not in text


def test_the_brokers_page_shows_no_password(flower: httpx.Client, servers: Servers) -> None:
    """Breaks if the broker's page shows the broker's password."""
    for path in PAGES:
        assert servers.broker_url not in flower.get(path, auth=CREDENTIALS).text


def test_flower_lists_the_queues(flower: httpx.Client, servers: Servers) -> None:
    """Breaks if Flower connects to another broker, or does not list the lanes."""
    settings = Settings(broker_url=servers.broker_url)
    celery = make_celery(settings, "publisher")
    celery.send_task(SWEEP, queue="maintenance")
    celery.close()
    queues = flower.get("/api/queues/length", auth=CREDENTIALS).json()["active_queues"]
    assert {queue["name"]: queue["messages"] for queue in queues}["maintenance"] >= 1


def test_the_task_history_is_bounded_and_shows_counts_of_deliveries(flower: httpx.Client, servers: Servers) -> None:
    """Breaks if Flower's memory grows without a limit, or Flower omits the newest tasks or their delivery counts."""
    celery = make_celery(Settings(broker_url=servers.broker_url), "publisher")
    sent = [uuid.uuid4().hex for _ in range(MAX_TASKS + 50)]
    with celery.events.default_dispatcher() as dispatcher:
        for task_id in sent:
            fields = {"name": APPLY, "args": "(3 deliveries)", "kwargs": "{}", "retries": 0}
            dispatcher.send("task-received", uuid=task_id, **fields)
    celery.close()

    def listed() -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = flower.get("/api/tasks", auth=CREDENTIALS, timeout=60).json()
        return found

    until(lambda: sent[-1] in listed())
    shown = listed()
    assert MAX_TASKS - 500 < len(shown) <= MAX_TASKS
    assert sent[0] not in shown
    assert (shown[sent[-1]]["name"], shown[sent[-1]]["args"]) == (APPLY, "(3 deliveries)")


def test_a_worker_is_online_during_a_long_task_and_offline_when_killed(
    flower: httpx.Client, live_worker: SharedWorker, engine: Engine
) -> None:
    """Breaks if Flower shows a worker as offline while it works, or as online long after it was killed."""

    def is_online() -> bool:
        found: dict[str, bool] = flower.get("/api/workers?status=true", auth=CREDENTIALS).json()
        return any(online for name, online in found.items() if name.startswith(f"live.{live_worker.process.pid}@"))

    until(is_online)
    with live_worker.busy(engine):
        for _ in range(round(LONG_TASK_SECONDS / 0.5)):
            assert is_online()
            time.sleep(0.5)
        live_worker.process.kill()
        killed = time.monotonic()
        until(lambda: not is_online())
        assert time.monotonic() - killed < 4 * INTERVAL_SECONDS


# If Flower started, it would replace this process, which would then print nothing.
START_ALL = """
import json, os, sys
from click.testing import CliRunner
from workers.cli.main import main
done = []
for os.environ["HEADRACE_FLOWER_AUTH"] in json.loads(sys.argv[1]):
    one = CliRunner().invoke(main, ["flower"], prog_name="headrace")
    done.append((one.exit_code, one.output))
print(json.dumps(done))
"""


def test_flower_does_not_start_without_a_password(servers: Servers) -> None:
    """Breaks if Flower starts with a missing or weak password."""
    auths = ["", "no-colon", "user:short", ":long-enough-password"]
    command = (sys.executable, "-c", START_ALL, json.dumps(auths))
    variables = environment(servers.broker_url, free_port())
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=True)
    results = dict(zip(auths, json.loads(done.stdout), strict=True))
    assert [auth for auth in auths if results[auth][0] != 1] == []
    assert [auth for auth in auths if "HEADRACE_FLOWER_AUTH: not set" not in results[auth][1]] == []


def test_the_module_of_flower_does_not_start_without_a_password(servers: Servers) -> None:
    """Breaks if Flower without the CLI, as `python -m workers.celery.flower`, starts without a password."""
    port = free_port()
    with (
        program("workers.celery.flower", **environment(servers.broker_url, port)) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
    ):
        until(lambda: process.poll() is not None or responds(client))
        assert process.poll() is not None or client.get("/workers").status_code == 401
