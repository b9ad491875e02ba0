"""The command line: output, errors and exit statuses."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from app.config.settings import Settings
from tests.support import JUNCTION_SECRET, ROOT, TERRA_SECRET, apply, delivery, workout
from tests.support.cases import Failures
from tests.support.cli import Run, error_line, invoke, processes
from workers.cli.main import COMMANDS, GROUPS, main
from workers.local.ports import free_port, held_port
from workers.store.engine import make_writer

SESAME = "sesame-open-the-door"
NOTHING = "127.0.0.1:1"  # no server listens here
DATABASE, BROKER = f"postgresql://u:{SESAME}@{NOTHING}/d", f"redis://:{SESAME}@{NOTHING}/0"
SECRET = {"JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET}


@pytest.fixture
def environment(settings: Settings, broker_url: str) -> dict[str, str]:
    """A complete deployment with an empty broker, so that no account is paused."""
    return {
        "DATABASE_URL": settings.need_database().replace("+psycopg", ""),
        "BROKER_URL": broker_url,
        "JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET,
        "TERRA_SIGNING_SECRET": TERRA_SECRET,
        "HEADRACE_FLOWER_AUTH": f"tests:{SESAME}",
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a command in a process of its own."""
    with processes(tmp_path_factory.mktemp("commands")) as run:
        yield run


def leaves(command: click.Command | None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and subcommand."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield (*path, name)
            yield from leaves(command.get_command(context, name), (*path, name))


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(flag: str) -> None:
    shown = invoke(flag).output
    lines = [line.split() for line in shown.partition("\nRun:")[2].splitlines() if line.startswith("  ")]
    assert [words[0] for words in lines] == list(COMMANDS)
    assert [title for title in GROUPS if f"\n{title}:\n" in shown] == list(GROUPS) == ["Run", "Look", "Act", "Test"]
    assert set(COMMANDS) >= {"up", "web", "worker", "beat", "flower", "migrate", "check", "status"}


def test_the_list_describes_commands_as_they_describe_themselves() -> None:
    """Breaks if a description in the list is no longer that of its command."""
    own = {name: main.get_command(click.Context(main), name) for name in COMMANDS}
    assert {name: one and one.get_short_help_str(200) for name, one in own.items()} == {
        name: listed.about for name, listed in COMMANDS.items()
    }


def test_every_command_and_option_has_help() -> None:
    failures = Failures()
    for words in list(leaves(main)):
        with failures.of(words):
            shown = invoke(*words, "--help", COLUMNS="200")
            assert shown.exit_code == 0
            about, _, options = shown.output.partition("Options:")
            assert len(about.split("\n\n")[1].strip()) > 10
            for line in options.splitlines():
                assert not line.strip().startswith("--") or len(line.strip().split("  ", 1)[-1].strip()) > 5, line
    assert failures == {}


def test_the_version_is_printed() -> None:
    assert "version" in invoke("--version").output
    command = (sys.executable, "-m", "workers.cli", "--version")
    assert "version" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["migrate"], {"DATABASE_URL": DATABASE, "BROKER_URL": BROKER}, "PostgreSQL: OperationalError"),
        (["migrate"], {"DATABASE_URL": f"mysql://u:{SESAME}@h/d"}, "DATABASE_URL: not usable"),
        (["migrate"], {"DATABASE_URL": SESAME}, "DATABASE_URL: not usable"),
        (["status"], {"DATABASE_URL": DATABASE, "BROKER_URL": BROKER}, "BROKER_URL: the broker cannot be reached"),
        (["check"], {"HEADRACE_ENCRYPTION_KEY": SESAME}, "HEADRACE_ENCRYPTION_KEY: not usable"),
        (["check"], {"JUNCTION_WEBHOOK_SECRET": SESAME}, "JUNCTION_WEBHOOK_SECRET: not usable"),
        (["web"], {"BROKER_URL": BROKER}, "JUNCTION_WEBHOOK_SECRET: not set"),
        (["web"], {"BROKER_URL": BROKER} | SECRET, "BROKER_URL: the broker cannot be reached"),
        (["web"], {"BROKER_URL": "amqp://127.0.0.1:1"} | SECRET, "BROKER_URL: the broker cannot be reached"),
        (["worker", "--lane", "live"], {"BROKER_URL": BROKER}, "DATABASE_URL: not set"),
        (["worker", "--lane", "live"], {"BROKER_URL": BROKER, "HEADRACE_PORT": SESAME}, "HEADRACE_PORT: not usable"),
        (["flower"], {"HEADRACE_FLOWER_AUTH": f"u:{SESAME}"}, "BROKER_URL: not set"),
        (["flower"], {"BROKER_URL": BROKER, "HEADRACE_FLOWER_AUTH": "u:short"}, "HEADRACE_FLOWER_AUTH: not set"),
        (["flower"], {"BROKER_URL": BROKER}, "HEADRACE_FLOWER_AUTH: not set"),
        (["flower"], {"BROKER_URL": BROKER, "HEADRACE_FLOWER_AUTH": SESAME}, "HEADRACE_FLOWER_AUTH: not set"),
        (["up", "--data-dir", "file/below"], {}, "HEADRACE_DATA_DIR: "),
    ],
)
def test_an_error_is_one_line_without_a_secret(
    tmp_path: Path, run: Run, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    (tmp_path / "file").touch()
    done = run(*arguments, **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"headrace: {message}")
    assert SESAME not in line


def test_a_port_in_use_is_refused_before_anything_is_started(tmp_path: Path, run: Run) -> None:
    """Breaks if `up` starts PostgreSQL and migrates before it says that the port is in use."""
    with held_port("127.0.0.1") as held:
        port = str(held.getsockname()[1])
        for arguments, environment in ((["--port", port], {}), ([], {"HEADRACE_PORT": port})):
            done = run("up", "--data-dir", str(tmp_path), *arguments, **environment)
            assert (done.returncode, done.stdout) == (1, "")
            name = "HEADRACE_PORT" if environment else "--port"
            assert done.stderr == f"headrace: {name}: port {port} on 127.0.0.1 is in use; choose another port\n"
    assert not (tmp_path / "postgres").exists()


def test_debug_shows_the_traceback(run: Run) -> None:
    done = run("--debug", "status")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "Misconfigured: no stack runs in" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["worker"], ["worker", "--lane", "fast"], ["up", "--workers", "0"], ["up", "--port", "99999"], ["unheard"]],
)
def test_wrong_usage_is_refused(arguments: list[str]) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "Usage:" in done.stderr


def test_a_typing_error_in_a_command_is_corrected() -> None:
    for words, near in (
        (["backfil"], "backfill"),
        (["backfill", "strat"], "start"),
        (["dead", "list", "--limt"], "--limit"),
    ):
        assert near in invoke(*words).stderr.partition("id you mean")[2]


def test_check_of_a_complete_deployment_succeeds(environment: dict[str, str], run: Run) -> None:
    done = run("check", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(line.startswith("ok ") for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == 9
    assert not any(value in done.stdout for name, value in environment.items() if name.endswith(("SECRET", "AUTH")))


def test_check_prints_faults_to_standard_error(environment: dict[str, str]) -> None:
    del environment["HEADRACE_FLOWER_AUTH"]
    done = invoke("check", **environment)
    assert done.exit_code == 1
    assert done.stderr.startswith("FAULT Flower: HEADRACE_FLOWER_AUTH: not set")
    assert len(done.stdout.splitlines()) == 8
    found = json.loads(invoke("check", "--json", **environment).stdout)
    assert [one["what"] for one in found if not one["fine"]] == ["Flower"]
    assert {"what", "fine", "is_warning", "text"} == set(found[0])


def test_check_without_settings_lists_the_missing_ones(run: Run) -> None:
    done = run("check", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    texts = " ".join(one["text"] for one in json.loads(done.stdout) if not one["fine"])
    for name in ("DATABASE_URL", "BROKER_URL", "JUNCTION_WEBHOOK_SECRET", "HEADRACE_FLOWER_AUTH"):
        assert f"{name}: not set" in texts


def test_explain_lists_every_setting() -> None:
    done = invoke("check", "--explain", "--json")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert {row["setting"] for row in rows} == {one.metadata["name"] for one in Settings.__dataclass_fields__.values()}
    table = invoke("check", "--explain", COLUMNS="300").stdout
    assert all(row["setting"] in table for row in rows)


@pytest.mark.parametrize(("words", "setting"), [(("flower",), "HEADRACE_FLOWER_PORT"), (("listen",), "--port")])
def test_a_port_in_use_is_named(words: tuple[str, ...], setting: str) -> None:
    """Breaks if a server prints a traceback about its port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        option, variables = ((setting, port), {}) if setting == "--port" else ((), {setting: str(port)})
        done = invoke(*words, *option, **variables, BROKER_URL=BROKER, HEADRACE_FLOWER_AUTH=f"tests:{SESAME}")
    assert error_line(done) == f"headrace: {setting}: port {port} on 127.0.0.1 is in use; choose another port"


def test_explain_shows_defaults_not_values() -> None:
    assert SESAME not in invoke("check", "--explain", JUNCTION_API_KEY=SESAME, HEADRACE_FLOWER_AUTH=SESAME).output


def test_migrate_prints_the_version_and_may_run_twice(environment: dict[str, str], run: Run) -> None:
    for _ in range(2):
        done = run("migrate", **environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "the schema is at version 0014\n", "")


def test_migrate_needs_only_the_database(environment: dict[str, str], run: Run) -> None:
    assert run("migrate", DATABASE_URL=environment["DATABASE_URL"]).returncode == 0


def test_status_is_json_and_a_table(environment: dict[str, str], settings: Settings, run: Run) -> None:
    writer = make_writer(settings)
    apply(writer, settings, delivery(workout("u1")), delivery(b"half"))
    writer.dispose()
    plain = json.loads(run("status", "--json", **environment).stdout)
    names = ["live", "download", "backfill", "maintenance", "notify", "derive"]
    assert [lane["name"] for lane in plain["lanes"]] == names
    assert {row["outcome"]: row["total"] for row in plain["deliveries"]} == {"applied": 1, "dead": 1}
    table = run("status", **environment)
    assert (table.returncode, table.stderr) == (0, "")
    assert "Deliveries" in table.stdout
    assert "Dead letters" in table.stdout


def test_status_without_a_database_is_one_line(environment: dict[str, str], run: Run) -> None:
    away = environment | {"DATABASE_URL": f"postgresql://u:{SESAME}@127.0.0.1:{free_port()}/d"}
    done = run("status", "--json", **away)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "headrace: PostgreSQL: OperationalError\n"


def test_check_without_a_broker_finishes(environment: dict[str, str], run: Run) -> None:
    done = run("check", "--json", **environment | {"BROKER_URL": BROKER})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(json.loads(done.stdout)) == 9


@pytest.mark.parametrize(
    ("option", "secret"), [("--to", ("secret", JUNCTION_SECRET)), ("--terra-to", ("terra_secret", TERRA_SECRET))]
)
def test_simulate_signs_with_the_secret_of_the_aggregator(
    monkeypatch: pytest.MonkeyPatch, option: str, secret: tuple[str, str]
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("workers.simulator.run", lambda **options: given.update(options))
    secrets = {"JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET, "TERRA_SIGNING_SECRET": TERRA_SECRET}
    assert invoke("simulate", option, "http://127.0.0.1:1", **secrets).exit_code == 0
    assert given[secret[0]] == secret[1]
    assert given[option.removeprefix("--").replace("-", "_")] == "http://127.0.0.1:1"


@pytest.mark.parametrize("option", ["--to", "--terra-to"])
def test_simulate_without_a_secret_is_an_error(option: str) -> None:
    done = invoke("simulate", option, "http://127.0.0.1:1")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("headrace: ")


PROGRAM = """
import json, sys
from click.testing import CliRunner
from workers.cli.main import main
for line in sys.stdin:
    before = set(sys.modules)
    done = CliRunner().invoke(main, json.loads(line), prog_name="headrace")
    libraries = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
    error = done.exception if done.exception and not isinstance(done.exception, SystemExit) else None
    print(json.dumps([done.exit_code, done.stderr, libraries, repr(error)]))
"""


def loaded(*commands: Sequence[str], **environment: str) -> Iterator[tuple[int, str, set[str]]]:
    """Runs commands in one new process. Returns the status and errors of each, and the libraries that it has loaded."""
    known = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=known,
        input="\n".join(map(json.dumps, commands)),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    for line in done.stdout.splitlines():
        status, errors, libraries, error = json.loads(line)
        assert error == "None", error
        yield status, errors, set(libraries)


# Of these, `rich` takes the least, 0.03 s of CPU, and SQLAlchemy with psycopg the most, 0.4 s.
SLOW = {
    *("alembic", "celery", "flask", "flower", "granian", "httpx", "kombu", "limits", "opentelemetry", "psycopg"),
    *("redis", "sqlalchemy", "tornado", "werkzeug"),
}
# Options and arguments that a command needs to end with the error that nothing is configured.
EXAMPLES = {
    "user": "u1",
    "since": "2026-01-01",
    "name": "sleep",
    "identifier": "1",
    "number": "1",
    "position": "1",
    "url": "http://127.0.0.1:1/",
    "sources": "oura/ring",
}
NEEDED = {
    **dict.fromkeys((("backfill", word) for word in ("pause", "resume", "cancel")), ("--user", "u1")),
    ("dead", "drop"): ("--all",),
    ("explain",): ("--resource", "sleep", "--id", "1"),
    ("feed", "reset"): ("--to", "1"),
    ("simulate",): ("--to", "http://127.0.0.1:1/"),
}
INDEPENDENT = {("up",), ("check",), ("roles",), ("listen",), ("drill",), ("console", "passwd")}


def least(words: tuple[str, ...]) -> tuple[str, ...]:
    """The command with its required options and arguments, and --yes."""
    command: click.Command | None = main
    for word in words:
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), word)
    assert command is not None
    more = list(NEEDED.get(words, ()))
    for one in command.params:
        choices = one.type.choices if isinstance(one.type, click.Choice) else [EXAMPLES.get(one.name or "", "x")]
        if one.required and one.opts[0] not in more:
            more += [*([one.opts[0]] if isinstance(one, click.Option) else []), str(choices[0])]
        elif one.name == "yes":
            more.append("--yes")
    return *words, *more


def test_an_error_loads_no_slow_library(tmp_path: Path) -> None:
    """Breaks if a command takes more than half a second of CPU before it reports that nothing is configured."""
    groups = {words[:-1] for words in leaves(main)} - {("console",)}
    commands = [least(words) for words in leaves(main) if words not in groups and words not in INDEPENDENT]
    failures = Failures()
    for words, result in zip(commands, loaded(*commands, HEADRACE_DATA_DIR=str(tmp_path)), strict=True):
        with failures.of(words):
            status, errors, libraries = result
            assert (status, errors.count("\n"), libraries & SLOW) == (1, 1, set())
            assert errors.startswith(f"headrace: no stack runs in {tmp_path}") or ": not set" in errors
    assert failures == {}


def test_help_loads_no_slow_library() -> None:
    """Breaks if the help of a command imports the libraries that the command needs: up to 0.9 s of CPU."""
    commands = [(), ("--version",), *leaves(main)]
    for words, (status, _, libraries) in zip(commands, loaded(*((*one, "--help") for one in commands)), strict=True):
        assert (words, status, libraries & SLOW) == (words, 0, set())


WITHOUT_BROKER = ("dead list", "backfill list", "audit --since 2026-03-14")
BROKERS = {"celery", "flask", "flower", "httpx", "kombu", "limits", "opentelemetry", "redis", "tornado"}


def test_a_command_loads_no_library_of_another_one(environment: dict[str, str]) -> None:
    """Breaks if a command that only needs the database loads the broker's libraries, before it prints anything."""
    commands = [words.split() for words in WITHOUT_BROKER]
    for words, (status, _, libraries) in zip(commands, loaded(*commands, **environment), strict=True):
        assert (words, status, libraries & BROKERS) == (words, 0, set())


def test_the_first_line_of_check_needs_no_service(environment: dict[str, str]) -> None:
    """Breaks if `check` imports the libraries of all checks before it prints the result of the first one."""
    ((_, _, libraries),) = loaded(("check", "--explain"), **environment)
    assert libraries & SLOW == set()


def test_status_loads_no_celery(environment: dict[str, str]) -> None:
    """Breaks if `status` takes longer, because it asks Redis for the queue depths through Celery."""
    ((_, _, libraries),) = loaded(("status",), **environment)
    assert libraries & {"alembic", "celery", "flask", "httpx", "kombu", "limits"} == set()
