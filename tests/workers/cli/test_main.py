"""The command line, as its users meet it: what it prints, where, and how it ends."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from app.config.settings import Settings
from tests.support import JUNCTION_SECRET, ROOT, TERRA_SECRET, apply, delivery, workout
from tests.support.cases import Failures
from tests.support.cli import Run, processes
from workers.cli.main import COMMANDS, main
from workers.local.ports import free_port
from workers.store.engine import make_writer

SESAME = "sesame-open-the-door"
NOTHING = "127.0.0.1:1"  # where nobody listens
DATABASE, BROKER = f"postgresql://u:{SESAME}@{NOTHING}/d", f"redis://:{SESAME}@{NOTHING}/0"
SECRET = {"JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET}


@pytest.fixture
def environment(settings: Settings, broker_url: str) -> dict[str, str]:
    """The variables of a complete deployment, whose broker is empty: what pauses an account is in it."""
    return {
        "DATABASE_URL": settings.need_database().replace("+psycopg", ""),
        "BROKER_URL": broker_url,
        "JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET,
        "TERRA_SIGNING_SECRET": TERRA_SECRET,
        "HEADRACE_FLOWER_AUTH": f"tests:{SESAME}",
    }


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder without a stack, and none of the variables that whoever runs the tests may have set."""
    monkeypatch.chdir(tmp_path)
    for name in [*(one.metadata["name"] for one in Settings.__dataclass_fields__.values()), "COLUMNS"]:
        monkeypatch.delenv(name, raising=False)
    return


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a command as a process of its own."""
    with processes(tmp_path_factory.mktemp("commands")) as run:
        yield run


def invoke(*arguments: str, **environment: str) -> Result:
    """The command within this process: quicker, for what neither starts nor becomes another one."""
    return CliRunner().invoke(main, arguments, env=environment)


def leaves(command: click.Command | None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, and of every command of a group."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield (*path, name)
            yield from leaves(command.get_command(context, name), (*path, name))


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(flag: str) -> None:
    """Breaks if a command cannot be found by whoever looks for it."""
    shown = invoke(flag).output
    listed = {line.split()[0] for line in shown.partition("Commands:")[2].splitlines() if line.strip()}
    assert listed == set(COMMANDS)
    assert listed >= {"up", "web", "worker", "beat", "flower", "migrate", "check", "status"}


def test_every_command_explains_itself() -> None:
    """Breaks if a command has no sentence about what it does."""
    failures = Failures()
    for words in list(leaves(main)):
        with failures.of(words):
            shown = invoke(*words, "--help")
            assert shown.exit_code == 0
            assert len(shown.output.splitlines()[2].strip()) > 10
    assert failures == {}


def test_the_version_is_told() -> None:
    """Breaks if a bug report cannot say which version it is about, or the package cannot be run as a program."""
    assert "version" in invoke("--version").output
    command = (sys.executable, "-m", "workers.cli", "--version")
    assert "version" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["migrate"], {"DATABASE_URL": DATABASE, "BROKER_URL": BROKER}, "PostgreSQL: OperationalError"),
        (["migrate"], {"DATABASE_URL": f"mysql://u:{SESAME}@h/d"}, "DATABASE_URL: not usable"),
        (["migrate"], {"DATABASE_URL": SESAME}, "DATABASE_URL: not usable"),
        (["migrate"], {}, "no stack runs in"),
        (["status"], {}, "no stack runs in"),
        (["status", "--json"], {}, "no stack runs in"),
        (["status"], {"DATABASE_URL": DATABASE, "BROKER_URL": BROKER}, "BROKER_URL: the broker cannot be reached"),
        (["check"], {"HEADRACE_ENCRYPTION_KEY": SESAME}, "HEADRACE_ENCRYPTION_KEY: not usable"),
        (["check"], {"JUNCTION_WEBHOOK_SECRET": SESAME}, "JUNCTION_WEBHOOK_SECRET: not usable"),
        (["web"], {}, "BROKER_URL: not set"),
        (["web"], {"BROKER_URL": BROKER}, "JUNCTION_WEBHOOK_SECRET: not set"),
        (["web"], {"BROKER_URL": BROKER} | SECRET, "BROKER_URL: the broker cannot be reached"),
        (["web"], {"BROKER_URL": "amqp://127.0.0.1:1"} | SECRET, "BROKER_URL: the broker cannot be reached"),
        (["worker", "--lane", "live"], {}, "BROKER_URL: not set"),
        (["worker", "--lane", "live"], {"BROKER_URL": BROKER}, "DATABASE_URL: not set"),
        (["worker", "--lane", "live"], {"BROKER_URL": BROKER, "HEADRACE_PORT": SESAME}, "HEADRACE_PORT: not usable"),
        (["beat"], {}, "BROKER_URL: not set"),
        (["flower"], {"HEADRACE_FLOWER_AUTH": f"u:{SESAME}"}, "BROKER_URL: not set"),
        (["flower"], {"BROKER_URL": BROKER, "HEADRACE_FLOWER_AUTH": "u:short"}, "HEADRACE_FLOWER_AUTH: not set"),
        (["flower"], {"BROKER_URL": BROKER}, "HEADRACE_FLOWER_AUTH: not set"),
        (["flower"], {"BROKER_URL": BROKER, "HEADRACE_FLOWER_AUTH": SESAME}, "HEADRACE_FLOWER_AUTH: not set"),
        (["up", "--data-dir", "file/below"], {}, "HEADRACE_DATA_DIR: "),
    ],
)
def test_an_error_is_one_line_without_a_secret(
    tmp_path: Path, run: Run, arguments: list[str], environment: dict[str, str], told: str
) -> None:
    """Breaks if a wrong setting ends in a traceback, in status 0, on standard output, or in a secret in a log."""
    (tmp_path / "file").touch()
    done = run(*arguments, **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"headrace: {told}")
    assert SESAME not in line


def test_debug_shows_the_traceback(run: Run) -> None:
    """Breaks if the place of an error cannot be found out at all."""
    done = run("--debug", "status")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "Misconfigured: no stack runs in" in done.stderr


@pytest.mark.parametrize("arguments", [["worker"], ["worker", "--lane", "fast"], ["up", "--workers", "0"], ["unheard"]])
def test_wrong_usage_is_told(arguments: list[str]) -> None:
    """Breaks if a word that is wrong or missing starts something."""
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "Usage:" in done.stderr


def test_check_of_a_complete_deployment_is_fine(environment: dict[str, str], run: Run) -> None:
    """Breaks if nothing is wrong and the status is not 0, or a secret is shown."""
    done = run("check", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(line.startswith("ok ") for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == 8
    assert not any(value in done.stdout for name, value in environment.items() if name.endswith(("SECRET", "AUTH")))


def test_check_tells_its_faults_apart(environment: dict[str, str]) -> None:
    """Breaks if a fault is not on standard error, or does not make the status 1."""
    del environment["HEADRACE_FLOWER_AUTH"]
    done = invoke("check", **environment)
    assert done.exit_code == 1
    assert done.stderr.startswith("FAULT Flower: HEADRACE_FLOWER_AUTH: not set")
    assert len(done.stdout.splitlines()) == 7
    found = json.loads(invoke("check", "--json", **environment).stdout)
    assert [one["what"] for one in found if not one["fine"]] == ["Flower"]
    assert {"what", "fine", "text"} == set(found[0])


def test_check_without_anything_tells_what_is_missing(run: Run) -> None:
    """Breaks if the first look at a fresh installation is a traceback, or says nothing of one of the services."""
    done = run("check", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    texts = " ".join(one["text"] for one in json.loads(done.stdout) if not one["fine"])
    for name in ("DATABASE_URL", "BROKER_URL", "JUNCTION_WEBHOOK_SECRET", "HEADRACE_FLOWER_AUTH"):
        assert f"{name}: not set" in texts


def test_explain_lists_every_setting() -> None:
    """Breaks if a setting can only be found in the source."""
    done = invoke("check", "--explain", "--json")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert {row["setting"] for row in rows} == {one.metadata["name"] for one in Settings.__dataclass_fields__.values()}
    table = invoke("check", "--explain", COLUMNS="300").stdout
    assert all(row["setting"] in table for row in rows)


def test_explain_shows_no_value() -> None:
    """Breaks if the defaults that are shown are the settings that are set."""
    assert SESAME not in invoke("check", "--explain", JUNCTION_API_KEY=SESAME, HEADRACE_FLOWER_AUTH=SESAME).output


def test_migrate_tells_the_version_and_may_run_twice(environment: dict[str, str], run: Run) -> None:
    """Breaks if a job that runs before every start fails at the second."""
    for _ in range(2):
        done = run("migrate", **environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "the schema is at version 0002\n", "")


def test_migrate_needs_the_database_alone(environment: dict[str, str], run: Run) -> None:
    """Breaks if a migration job has to be given a broker that it does not use."""
    assert run("migrate", DATABASE_URL=environment["DATABASE_URL"]).returncode == 0


def test_status_is_json_and_a_table(environment: dict[str, str], settings: Settings, run: Run) -> None:
    """Breaks if a program cannot read the picture, or a person cannot."""
    writer = make_writer(settings)
    apply(writer, settings, delivery(workout("u1")), delivery(b"half"))
    writer.dispose()
    plain = json.loads(run("status", "--json", **environment).stdout)
    assert [lane["name"] for lane in plain["lanes"]] == ["live", "download", "backfill", "maintenance"]
    assert {row["outcome"]: row["total"] for row in plain["deliveries"]} == {"applied": 1, "dead": 1}
    table = run("status", **environment)
    assert (table.returncode, table.stderr) == (0, "")
    assert "Deliveries" in table.stdout
    assert "Dead letters" in table.stdout


def test_status_of_a_database_that_is_away_is_one_line(environment: dict[str, str], run: Run) -> None:
    """Breaks if a database that is down shows as a traceback."""
    away = environment | {"DATABASE_URL": f"postgresql://u:{SESAME}@127.0.0.1:{free_port()}/d"}
    done = run("status", "--json", **away)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "headrace: PostgreSQL: OperationalError\n"


def test_check_of_a_broker_that_is_away_finishes(environment: dict[str, str], run: Run) -> None:
    """Breaks if `headrace check` ends in a traceback just when the broker is what is broken."""
    done = run("check", "--json", **environment | {"BROKER_URL": BROKER})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(json.loads(done.stdout)) == 8


@pytest.mark.parametrize(
    ("option", "secret"), [("--to", ("secret", JUNCTION_SECRET)), ("--terra-to", ("terra_secret", TERRA_SECRET))]
)
def test_simulate_signs_with_the_secret_of_whom_it_plays(
    monkeypatch: pytest.MonkeyPatch, option: str, secret: tuple[str, str]
) -> None:
    """Breaks if events are signed with the other's secret, or one's without a stack cannot be sent."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("workers.simulator.run", lambda **options: given.update(options))
    secrets = {"JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET, "TERRA_SIGNING_SECRET": TERRA_SECRET}
    assert invoke("simulate", option, "http://127.0.0.1:1", **secrets).exit_code == 0
    assert given[secret[0]] == secret[1]
    assert given[option.removeprefix("--").replace("-", "_")] == "http://127.0.0.1:1"


@pytest.mark.parametrize("option", ["--to", "--terra-to"])
def test_simulate_without_a_secret_says_where_it_looked(option: str) -> None:
    """Breaks if events are sent that nobody can take, or the error is a traceback."""
    done = invoke("simulate", option, "http://127.0.0.1:1")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("headrace: ")


def test_a_worker_loads_no_other_command() -> None:
    """Breaks if each process of a lane loads the libraries of other commands, or Celery's command line with Flower."""
    program = "import sys; from workers.cli.main import main; main.get_command(None, 'worker'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    foreign = {"alembic", "celery.bin", "flask", "flower", "tornado", "workers.simulator", "workers.verify"}
    assert foreign & set(done.stdout.split()) == set()
