"""Flower as a process: every page needs the password."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from flower.urls import handlers
from sqlalchemy import Engine
from tornado.web import StaticFileHandler

from app.broker.celery import make_celery
from app.broker.lanes import APPLY, SWEEP
from app.config.settings import Settings
from tests.deploy.support import SAMPLES
from tests.support import ENVIRONMENT, program, status, until
from tests.support.quick_worker import INTERVAL_SECONDS
from tests.support.servers import Servers
from tests.support.workers import SharedWorker
from workers.celery.guesses import FORGET_SECONDS, MAX_ADDRESSES, MAX_PAUSE, Guesses
from workers.local.ports import free_port
from workers.local.secrets import WITHHELD

pytestmark = pytest.mark.processes
MAX_TASKS = 5000  # of Flower's history
LONG_TASK_SECONDS = 3.5 * INTERVAL_SECONDS
CREDENTIALS = ("tests", "sesame-open-the-door")
AUTH = ":".join(CREDENTIALS)
PAGES = ["/", "/tasks", "/workers", "/broker", "/metrics", "/api/workers", "/api/tasks", "/api/queues/length"]
PUBLIC_PATHS = ("/healthcheck", "/login", "/logout")


METHODS = ("POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "PROPFIND")


def paths() -> list[str]:
    """One path per handler of Flower: read from its list, so that pages of newer versions are tested too."""
    found = []
    for one in handlers:
        pattern, handler = (one.regex.pattern, one.handler_class) if hasattr(one, "regex") else one[:2]
        path = pattern.removesuffix("$").replace("(.+)", "x").replace("(.*)", "x").removesuffix("/?")
        if handler is not StaticFileHandler and path != ".*" and path not in PUBLIC_PATHS:
            found.append(path)
    return found


@contextmanager
def running_flower(
    broker_url: str, *command: str, log: Path = Path(os.devnull), **variables: str
) -> Iterator[tuple["subprocess.Popen[bytes]", httpx.Client]]:
    """A Flower that has responded or ended, and an HTTP client without the password."""
    port = free_port()
    variables = {"BROKER_URL": broker_url, "HEADRACE_FLOWER_PORT": str(port)} | variables
    url = f"http://127.0.0.1:{port}"
    with (
        program(*command or ("workers.cli", "flower"), log=log, **variables) as process,
        httpx.Client(base_url=url, timeout=20) as client,
    ):
        until(lambda: process.poll() is not None or status(f"{url}/healthcheck") == 200)
        yield process, client


@pytest.fixture(scope="module")
def flower(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """An HTTP client of a running Flower, without the password."""
    log = tmp_path_factory.mktemp("flower") / "log"
    with running_flower(servers.broker_url, log=log, HEADRACE_FLOWER_AUTH=AUTH) as (process, client):
        assert process.poll() is None, log.read_text()
        yield client
    assert AUTH not in log.read_text()


@pytest.fixture(autouse=True)
def fresh_guesses(request: pytest.FixtureRequest) -> None:
    """A right password ends the pauses after the wrong ones of the test before."""
    if "flower" in request.fixturenames:
        client: httpx.Client = request.getfixturevalue("flower")
        until(lambda: client.get("/workers", auth=CREDENTIALS).status_code == 200)


@pytest.mark.parametrize("path", sorted({*PAGES, *paths()}))
def test_every_page_rejects_requests_without_the_password(flower: httpx.Client, path: str) -> None:
    """Breaks if a client can see tasks without a password: Flower leaves some of its pages open."""
    for auth in (None, (CREDENTIALS[0], "wrong"), ("", "")):
        assert flower.get(path, auth=auth).status_code == 401


@pytest.mark.parametrize("path", sorted({*PAGES, *paths(), *PUBLIC_PATHS, "/static/js/flower.js", "/no-such-page"}))
def test_every_page_is_read_only(flower: httpx.Client, path: str) -> None:
    """Breaks if a user of Flower can shut down a worker, stop its queue, or run, revoke or change a task."""
    token = "00" * 16  # the XSRF token must not be the only protection
    headers = {"X-Xsrftoken": token, "Cookie": f"_xsrf={token}"}
    for method in METHODS:
        for auth in (None, CREDENTIALS):
            assert flower.request(method, path, auth=auth, headers=headers).status_code == 405


def test_no_route_changes_something_when_it_is_read() -> None:
    """Breaks if a route that changes something also accepts GET. Those that accept both only read."""
    classes = [one.handler_class if hasattr(one, "regex") else one[1] for one in handlers]
    both = {one.__name__ for one in classes if "get" in vars(one) and "post" in vars(one)}
    assert both == {"TasksDataTable", "NotFoundErrorHandler"}
    assert sum("post" in vars(one) for one in classes) > 15


def test_the_table_of_tasks_is_read_with_get(flower: httpx.Client) -> None:
    """Breaks if the page of tasks stays empty, because its script sends POST."""
    script = flower.get("/static/js/flower.js").text
    before, found, _ = script.partition("'/tasks/datatable'")
    assert found
    assert "type: 'GET'" in before[-100:]
    assert "POST" not in before[-100:]
    query = {"draw": "1", "start": "0", "length": "10", "order[0][column]": "0", "columns[0][data]": "name"}
    assert flower.get("/tasks/datatable", params=query, auth=CREDENTIALS).json()["draw"] == 1


def test_guesses_at_the_password_are_slowed(flower: httpx.Client) -> None:
    """Breaks if many guesses a second can be made."""
    began = time.monotonic()
    for number in range(5):
        assert flower.get("/workers", auth=(CREDENTIALS[0], f"guess {number}")).status_code == 401
    assert time.monotonic() - began > 0.1 + 0.2 + 0.4 + 0.8


def test_parallel_guesses_are_slowed(flower: httpx.Client) -> None:
    """Breaks if guesses are compared faster when they are sent in parallel, or if other requests wait for them."""

    def guess(number: int) -> tuple[int, float]:
        status = httpx.get(f"{flower.base_url}/workers", auth=(CREDENTIALS[0], f"{number}"), timeout=60).status_code
        return status, time.monotonic()

    with ThreadPoolExecutor(12) as pool:
        found = [pool.submit(guess, number) for number in range(12)]
        time.sleep(0.3)
        sent = time.monotonic()
        assert flower.get("/healthcheck").status_code == 200  # the event loop is not blocked
        assert flower.get("/workers").status_code == 401  # a request without credentials is not a guess
        assert time.monotonic() - sent < 1
        results = [one.result() for one in found]
    ended = sorted(when for status, when in results if status == 401)
    assert ended[-1] - ended[0] > 0.09 * (len(ended) - 1)
    assert {status for status, _ in results} <= {401, 429}  # 429: more than 10 s until its turn


@pytest.mark.parametrize(
    "header", ["Basic", "Basic !", "Basic w6k6w6k=", "Basic é", "Bearer x", "Basic Og==", "x" * 5000]
)
def test_malformed_credentials_are_wrong(flower: httpx.Client, header: str) -> None:
    """Breaks if a header that Flower cannot read ends in a status 500."""
    assert flower.get("/workers", headers={"Authorization": header.encode()}).status_code == 401


def test_pauses_grow_and_are_bounded() -> None:
    """Breaks if pauses do not grow, grow without a limit, never end, or use memory for every address."""
    guesses, now = Guesses(), 1000.0
    assert guesses.wait("a", now) == 0
    pauses = []
    for _ in range(8):
        guesses.record("a", now, is_right=False)
        pauses.append(guesses.wait("a", now))
        now += 100
        guesses.wait("a", now)
    assert pauses[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert max(pauses) == MAX_PAUSE
    assert None in [guesses.wait("a", now) for _ in range(20)]
    assert guesses.wait("b", now) == 0
    assert guesses.wait("a", now + 2 * FORGET_SECONDS) == 0
    guesses.record("a", now, is_right=False)
    guesses.record("a", now, is_right=True)
    assert guesses.wait("a", now) == 0
    for number in range(2 * MAX_ADDRESSES):
        guesses.record(f"{number}", now, is_right=False)
    assert len(guesses._wrong) == MAX_ADDRESSES


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


@pytest.fixture(scope="module")
def module_worker(deployment: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedWorker]:
    """A worker with short intervals between heartbeats."""
    with SharedWorker(deployment, tmp_path_factory.mktemp("worker"), "tests.support.quick_worker") as worker:
        yield worker


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
        until(lambda: not is_online(), 4 * INTERVAL_SECONDS)


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


def test_the_endpoints_address_does_not_open_flower(servers: Servers) -> None:
    """Breaks if HEADRACE_HOST, which opens the endpoint to the network, opens Flower as well."""
    variables = {"HEADRACE_FLOWER_AUTH": AUTH, "HEADRACE_HOST": "0.0.0.0"}  # noqa: S104
    with running_flower(servers.broker_url, **variables) as (process, _):
        listening = [one for one in psutil.Process(process.pid).net_connections() if one.status == psutil.CONN_LISTEN]
        assert {one.laddr.ip for one in listening} == {"127.0.0.1"}


def test_flower_keeps_no_secret_that_it_does_not_need(servers: Servers) -> None:
    """Breaks if whoever controls Flower can decrypt bodies, although it was started with every setting."""
    withheld = {name: SAMPLES.get(name, f"a {name} of 16 letters") for name in WITHHELD["flower"]}
    with running_flower(servers.broker_url, HEADRACE_FLOWER_AUTH=AUTH, **withheld) as (process, _):
        assert psutil.Process(process.pid).environ().keys() & withheld.keys() == set()


def test_flower_does_not_start_without_a_password(servers: Servers) -> None:
    """Breaks if Flower starts with a missing or weak password."""
    auths = ["", "no-colon", "user:short", ":long-enough-password"]
    command = (sys.executable, "-c", START_ALL, json.dumps(auths))
    variables = ENVIRONMENT | {"BROKER_URL": servers.broker_url, "HEADRACE_FLOWER_PORT": str(free_port())}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=True)
    results = dict(zip(auths, json.loads(done.stdout), strict=True))
    assert [auth for auth in auths if results[auth][0] != 1] == []
    assert [auth for auth in auths if "HEADRACE_FLOWER_AUTH: not set" not in results[auth][1]] == []


def test_the_module_of_flower_does_not_start_without_a_password(servers: Servers) -> None:
    """Breaks if Flower without the CLI, as `python -m workers.celery.flower`, starts without a password."""
    with running_flower(servers.broker_url, "workers.celery.flower") as (process, client):
        assert process.poll() is not None or client.get("/workers").status_code == 401
