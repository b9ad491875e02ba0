"""deploy/systemd, by systemd's own eyes where it is installed, and by the command line and the settings everywhere."""

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

FOLDER = DEPLOY / "systemd"
COMMON = FOLDER / "headrace-.service.d" / "common.conf"
SERVICES = sorted(FOLDER.glob("*.service"))
EXECUTABLE = "/opt/headrace/bin/headrace"


def directives(file: Path) -> dict[str, list[str]]:
    """A unit: each directive with its values. Its first line says what it is."""
    found: dict[str, list[str]] = defaultdict(list)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    for line in lines:
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found[name].append(value)
    return found


def command(file: Path) -> list[str]:
    """What a unit runs; the first word is the executable."""
    (line,) = directives(file)["ExecStart"]
    return shlex.split(line)


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """Breaks if systemd would pass over a misspelt directive, or refuse a unit."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze")
    units = tmp_path / "units"
    shutil.copytree(FOLDER, units)
    for file in units.glob("*.service"):  # it looks whether the executable is there
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
    said = [line for line in done.stderr.splitlines() if "headrace" in line]  # not what it thinks of other units
    assert (done.returncode, said) == (0, [])


@pytest.mark.parametrize("file", [one for one in SERVICES if "@" not in one.name], ids=lambda one: one.name)
def test_its_command_is_one_of_headrace(file: Path) -> None:
    """Breaks if a service would end at once with a usage error."""
    executable, *arguments = command(file)
    assert executable == EXECUTABLE
    assert parse(arguments) == [file.stem.removeprefix("headrace-")]


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("number", ["", "-1", "-12"])
def test_an_instance_is_a_worker_of_its_lane(lane: str, number: str) -> None:
    """Breaks if headrace-worker@live-2 works on another lane than `live`, or on none."""
    shell, option, script, instance = command(FOLDER / "headrace-worker@.service")
    assert (shell, option, instance) == ("/bin/sh", "-c", "%i")
    # systemd reads $$ as $ and %% as %; the arguments are shown in place of running them.
    shown = script.replace("$$", "$").replace("%%", "%").replace(f"exec {EXECUTABLE}", "echo")
    done = subprocess.run([shell, option, shown, f"{lane}{number}"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["worker", "--lane", lane]
    parse(done.stdout.split())


def test_nobody_is_told_more_than_it_needs() -> None:
    """Breaks if the endpoint knows the database, or a misspelt name keeps a secret where it is not needed."""
    kept = {file.stem: set(" ".join(directives(file)["UnsetEnvironment"]).split()) for file in SERVICES}
    assert all(names <= SETTINGS for names in kept.values())
    signing = {"JUNCTION_WEBHOOK_SECRET", "TERRA_SIGNING_SECRET"}
    asking = {"JUNCTION_API_KEY", "TERRA_API_KEY"}
    own, database, pipeline = {"HEADRACE_FLOWER_AUTH"}, {"DATABASE_URL"}, {"HEADRACE_ETL_URL"}
    assert kept == {
        "headrace-web": database | asking | own | pipeline,
        "headrace-worker@": signing | own | pipeline,
        "headrace-etl": signing | own,
        "headrace-beat": database | asking | signing | own | pipeline,
        "headrace-flower": database | asking | signing | pipeline,
    }


def test_every_service_is_sandboxed() -> None:
    """Breaks if the file that all of them share has a name for which systemd does not look."""
    assert all(file.name.startswith(COMMON.parent.name.partition(".")[0]) for file in SERVICES)
    common = directives(COMMON)
    assert common["EnvironmentFile"] == ["/etc/headrace/env"]
    assert common["DynamicUser"] == common["NoNewPrivileges"] == ["yes"]
    assert common["ProtectSystem"] == ["strict"]
    assert common["CapabilityBoundingSet"] == [""]
    assert common["Restart"] == ["always"]
    assert common["LimitCORE"] == ["0"]


def test_a_worker_may_finish_its_message() -> None:
    """Breaks if a worker is killed in the middle of a message that it would have finished."""
    for name in ("headrace-worker@.service", "headrace-etl.service"):
        assert int(directives(FOLDER / name)["TimeoutStopSec"][0]) >= 60
    assert "TimeoutStopSec" not in directives(COMMON)  # which would be read after it, and win


def test_the_procfile_has_every_process() -> None:
    """Breaks if a Procfile's line is none of our commands, or if a lane has no workers."""
    lines = re.findall(r"^(\w+): headrace (.+)$", (ROOT / "Procfile").read_text(encoding="utf-8"), re.MULTILINE)
    processes = {name: parse(arguments.split()) for name, arguments in lines}
    assert processes == {
        "release": ["migrate"],
        **{name: [name] for name in ("web", "beat", "flower", "etl")},
        **{lane: ["worker"] for lane in LANES},
    }
