"""deploy/systemd: checked by systemd-analyze if it is installed, and against the command line and the settings."""

import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from app.broker.lanes import LANES
from tests.deploy.support import DEPLOY, ROOT, SETTINGS, parse
from workers.local.secrets import SECRET_VARIABLES, WITHHELD, WITHHELD_BY_LANE, withheld

FOLDER = DEPLOY / "systemd"
COMMON = FOLDER / "headrace-.service.d" / "common.conf"
SERVICES = sorted(FOLDER.glob("*.service"))
EXECUTABLE = "/opt/headrace/bin/headrace"


def directives(file: Path) -> dict[str, list[str]]:
    """The values of each directive of a unit, whose first line must be a comment."""
    found: dict[str, list[str]] = defaultdict(list)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    for line in lines:
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found[name].append(value)
    return found


def command(file: Path) -> list[str]:
    """The command of a unit; the first word is the executable."""
    (line,) = directives(file)["ExecStart"]
    return shlex.split(line)


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """Breaks if systemd would ignore a misspelt directive or reject a unit."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze")
    units = tmp_path / "units"
    shutil.copytree(FOLDER, units)
    for file in units.glob("*.service"):  # verify checks that the executable exists
        file.write_text(file.read_text(encoding="utf-8").replace(EXECUTABLE, sys.executable))
    names = ["headrace.target", *(file.name.replace("@", "@live-1") for file in SERVICES)]
    done = subprocess.run(
        [analyze, "verify", *names],
        env={"SYSTEMD_UNIT_PATH": f"{units}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    messages = [line for line in done.stderr.splitlines() if "headrace" in line]  # without messages about other units
    assert (done.returncode, messages) == (0, [])


@pytest.mark.parametrize("file", [one for one in SERVICES if "@" not in one.name], ids=lambda one: one.name)
def test_every_command_is_valid(file: Path) -> None:
    """Breaks if a service would exit with a usage error."""
    executable, *arguments = command(file)
    assert executable == EXECUTABLE
    assert parse(arguments) == [file.stem.removeprefix("headrace-")]


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("number", ["", "-1", "-12"])
def test_an_instance_is_a_worker_of_its_lane(lane: str, number: str) -> None:
    """Breaks if headrace-worker@live-2 consumes another lane than `live`, or none."""
    shell, option, script, instance = command(FOLDER / "headrace-worker@.service")
    assert (shell, option, instance) == ("/bin/sh", "-c", "%i")
    # systemd reads $$ as $ and %% as %; `echo` prints the arguments instead of running the command.
    printing = script.replace("$$", "$").replace("%%", "%").replace(f"exec {EXECUTABLE}", "echo")
    done = subprocess.run([shell, option, printing, f"{lane}{number}"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["worker", "--lane", lane]
    parse(done.stdout.split())


def test_no_service_gets_a_secret_that_it_does_not_need() -> None:
    """Breaks if the endpoint gets the database URL, or a misspelt name leaves a secret in an environment."""
    removed = {file.stem: set(" ".join(directives(file)["UnsetEnvironment"]).split()) for file in SERVICES}
    assert all(names <= SETTINGS for names in removed.values())
    assert removed == {
        f"headrace-{'worker@' if name == 'worker' else name}": set(names)
        for name, names in WITHHELD.items()
        if name != "migrate"
    }


@pytest.mark.parametrize("instance", [*LANES, *(f"{lane}-2" for lane in WITHHELD_BY_LANE)])
def test_a_worker_gets_only_the_secrets_of_its_lane(instance: str) -> None:
    """Breaks if a worker of `notify` or `derive` gets the API keys, or one of another lane lacks a secret."""
    unit = FOLDER / "headrace-worker@.service"
    shell, option, script, _ = command(unit)
    printing = script.replace("$$", "$").replace("%%", "%").replace(f"exec {EXECUTABLE}", "env; :")
    (removed,) = directives(unit)["UnsetEnvironment"]
    given = dict.fromkeys(SECRET_VARIABLES - set(removed.split()), "x")
    done = subprocess.run([shell, option, printing, instance], env=given, capture_output=True, text=True, check=True)
    left = {line.partition("=")[0] for line in done.stdout.splitlines()} & SECRET_VARIABLES
    assert left == SECRET_VARIABLES - withheld(("worker", "--lane", instance.partition("-")[0]))


def test_every_service_is_sandboxed() -> None:
    """Breaks if systemd does not find the shared drop-in file by its name, or it lacks a restriction."""
    assert all(file.name.startswith(COMMON.parent.name.partition(".")[0]) for file in SERVICES)
    common = directives(COMMON)
    assert common["EnvironmentFile"] == ["/etc/headrace/env"]
    assert common["DynamicUser"] == common["NoNewPrivileges"] == ["yes"]
    assert common["ProtectSystem"] == ["strict"]
    assert common["CapabilityBoundingSet"] == [""]
    assert common["Restart"] == ["always"]
    assert common["LimitCORE"] == ["0"]


def test_a_worker_has_time_to_finish_its_message() -> None:
    """Breaks if a stopping worker is killed within 60 s, before it finishes its message."""
    for name in ("headrace-worker@.service", "headrace-etl.service"):
        assert int(directives(FOLDER / name)["TimeoutStopSec"][0]) >= 60
    assert "TimeoutStopSec" not in directives(COMMON)  # systemd reads the drop-in last, so it would take precedence


def test_the_procfile_has_every_process() -> None:
    """Breaks if a line of the Procfile is not a valid command, or a lane has no workers."""
    lines = re.findall(r"^(\w+): headrace (.+)$", (ROOT / "Procfile").read_text(encoding="utf-8"), re.MULTILINE)
    processes = {name: parse(arguments.split()) for name, arguments in lines}
    assert processes == {
        "release": ["migrate"],
        **{name: [name] for name in ("web", "beat", "flower", "console", "etl")},
        **{lane: ["worker"] for lane in LANES},
    }
