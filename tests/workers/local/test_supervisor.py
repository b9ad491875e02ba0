"""The supervisor, with real processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT
from tests.support.processes import lives
from workers.local import supervisor
from workers.local.supervisor import NotStarted, Program, Supervisor, running

# A program with one child of its own; both write their numbers down.
FAMILY = """
import os, sys, time
child = os.fork()
if child == 0:
    time.sleep(600)
open(sys.argv[1] + ".new", "w").write(f"{os.getpid()} {child}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""

# A supervisor of one family and one deaf program; it writes every change of pids down.
SUPERVISED = """
import logging, signal, sys
from pathlib import Path
from workers.local.supervisor import Program, Supervisor
logging.basicConfig(level=logging.INFO, format="%(message)s")
folder, family, deaf = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def program(name, code, **more):
    return Program(name, name, (sys.executable, "-c", code, str(folder / name)), {}, folder / f"{name}.log",
                   (folder / name).exists, before_start=lambda: (folder / name).unlink(missing_ok=True), **more)
with Supervisor() as them:
    them.start([program("family", family)])
    them.start([program("deaf", deaf, stop_seconds=float(sys.argv[4]))])
    (folder / "pids").write_text(repr(them.pids()))
    them.run(lambda pids: bool((folder / "pids").write_text(repr(pids))))
"""

DEAF = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1] + ".heard", "w").close())
open(sys.argv[1] + ".new", "w").write(f"{os.getpid()} {os.getpid()}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
while True:
    time.sleep(1)
"""


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def numbers(file: Path) -> tuple[int, int]:
    until(file.exists)
    main, child = file.read_text().split()
    return int(main), int(child)


def python(folder: Path, code: str, **more) -> Program:
    file = folder / "one"
    values = {"group": "one", "name": "one", "environment": {}, "log": folder / "one.log", "ready": file.exists}
    return Program(command=(sys.executable, "-c", code, str(file)), **(values | more))


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*, deaf: str = FAMILY, stop_seconds: float = 20) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SUPERVISED, str(tmp_path), FAMILY, deaf, str(stop_seconds)]
        with (tmp_path / "stderr").open("wb") as errors:
            process = subprocess.Popen(command, cwd=ROOT, stderr=errors)
        started.append(process)
        until((tmp_path / "pids").exists)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    # A killed supervisor leaves grandchildren. Those of PostgreSQL and granian end by themselves; these must be killed.
    for file in (tmp_path / "family", tmp_path / "deaf"):
        for pid in numbers(file) if file.exists() else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()


def test_a_killed_program_is_restarted_and_its_group_killed(supervised, tmp_path: Path) -> None:
    """Its children could still hold the port."""
    process = supervised()
    main, child = numbers(tmp_path / "family")
    os.kill(main, signal.SIGKILL)
    until(lambda: not lives(child))
    until(lambda: (tmp_path / "family").exists() and numbers(tmp_path / "family")[0] != main)
    new = numbers(tmp_path / "family")[0]
    until(lambda: f"'family': [{new}]" in (tmp_path / "pids").read_text())
    assert f"family (pid {main}) ended with status -9" in (tmp_path / "stderr").read_text()
    process.terminate()
    assert process.wait(10) == 0


def test_a_child_that_left_the_group_is_killed(supervised, tmp_path: Path) -> None:
    """PostgreSQL's backends are sessions of their own, and would keep a new postmaster from starting."""
    leaver = FAMILY.replace("    time.sleep(600)\nopen", "    os.setsid()\n    time.sleep(600)\nopen")
    assert leaver != FAMILY
    supervised(deaf=leaver)
    main, child = numbers(tmp_path / "deaf")
    os.kill(main, signal.SIGKILL)
    until(lambda: not lives(child))
    assert lives(numbers(tmp_path / "family")[1]), "a child of a living program is no orphan"


def test_sigterm_stops_everything(supervised, tmp_path: Path) -> None:
    process = supervised()
    pids = [*numbers(tmp_path / "family"), *numbers(tmp_path / "deaf")]
    process.terminate()
    assert process.wait(10) == 0
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_killing_the_supervisor_leaves_no_main_process(supervised, tmp_path: Path) -> None:
    process = supervised()
    mains = [numbers(tmp_path / "family")[0], numbers(tmp_path / "deaf")[0]]
    children = [numbers(tmp_path / "family")[1], numbers(tmp_path / "deaf")[1]]
    process.kill()
    until(lambda: not any(map(lives, mains)))
    for pid in children:  # this family's main process does not take its child along; a real one does
        os.kill(pid, signal.SIGKILL)


def test_a_second_signal_kills(supervised, tmp_path: Path) -> None:
    process = supervised(deaf=DEAF, stop_seconds=60)
    pid = numbers(tmp_path / "deaf")[0]
    process.send_signal(signal.SIGINT)
    until((tmp_path / "deaf.heard").exists)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 0
    assert not psutil.pid_exists(pid)


def test_a_program_that_ignores_its_stop_signal_is_killed(tmp_path: Path) -> None:
    with running(python(tmp_path, DEAF, stop_seconds=0.3)) as process:
        began = time.monotonic()
    assert process.returncode == -signal.SIGKILL
    assert time.monotonic() - began < 3


def test_a_stopped_program_receives_its_stop_signal(tmp_path: Path) -> None:
    with running(python(tmp_path, FAMILY)) as process:
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    assert process.returncode == -signal.SIGTERM


def test_a_program_that_keeps_dying_raises_not_started(tmp_path: Path) -> None:
    """The error names the log instead of quoting it, because a log may contain secrets."""
    with Supervisor(whole_process=False) as them, pytest.raises(NotStarted) as message:
        them.start([python(tmp_path, "import sys; sys.exit('secret')")])
    assert str(message.value) == f"one died 5 times at start; see {tmp_path / 'one.log'}"
    assert (tmp_path / "one.log").read_text().count("secret") == 5
    assert (tmp_path / "one.log").stat().st_mode & 0o777 == 0o600


def test_a_program_is_waited_for_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Breaks if a start on a busy machine is given up, or nothing says which program is waited for."""
    monkeypatch.setattr(supervisor, "REPORT_SECONDS", 0.2)
    slow = "import sys, time\ntime.sleep(1)\nopen(sys.argv[1], 'w').close()\ntime.sleep(60)"
    quick = python(tmp_path, "import time; time.sleep(60)", name="quick", ready=lambda: True)
    with Supervisor(whole_process=False) as them:
        them.start([quick, python(tmp_path, slow)])
    lines = [one.getMessage() for one in caplog.records]
    assert len(lines) >= 3
    assert set(lines) == {"waiting for one (started 0 s ago, still starting)"} | {
        one for one in lines if "started 1 s ago" in one
    }


def test_a_signal_ends_the_waiting(tmp_path: Path) -> None:
    """Breaks if Ctrl-C does not stop a stack of which a program never becomes ready."""
    code = """
import os, sys
from pathlib import Path
from workers.local.supervisor import Program, Supervisor
with Supervisor() as them:
    them.start([Program("s", "s", (sys.executable, "-c", "import time; print('.', flush=True); time.sleep(60)"), {},
                        Path(sys.argv[1]), lambda: False)])
"""
    log = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", code, str(log)], cwd=ROOT, stderr=subprocess.PIPE) as process:
        until(lambda: log.exists() and log.read_text())
        (child,) = psutil.Process(process.pid).children()
        process.terminate()
        _, errors = process.communicate(timeout=10)
    assert errors.decode().strip().endswith("KeyboardInterrupt")
    assert not psutil.pid_exists(child.pid)


def test_an_idle_supervisor_sleeps(supervised, tmp_path: Path) -> None:
    """Breaks if it polls: ten times a second was a fifth of the CPU time of an idle stack."""
    process = psutil.Process(supervised().pid)
    time.sleep(0.5)
    before = process.num_ctx_switches().voluntary
    time.sleep(2)
    assert process.num_ctx_switches().voluntary - before <= 2
    os.kill(numbers(tmp_path / "family")[0], signal.SIGKILL)
    began = time.monotonic()
    until(lambda: not (tmp_path / "family").exists())  # it is started again, at once
    assert time.monotonic() - began < 1


def test_the_death_of_the_parent_stops_everything(tmp_path: Path) -> None:
    """Breaks if a killed demo or drill leaves its stack running."""
    child = """
import os, sys
from pathlib import Path
from workers.local.supervisor import Program, Supervisor
file = Path(sys.argv[1])
with Supervisor(parent=os.getppid()) as them:
    them.start([Program("s", "s", ("/bin/sleep", "60"), {}, Path(os.devnull), lambda: True)])
    print(os.getpid(), them.process("s").pid, flush=True)
    them.run(lambda pids: True)
"""
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]], start_new_session=True)"
    command = [sys.executable, "-c", parent, child, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert all(map(lives, pids))
        process.kill()
        until(lambda: not any(map(lives, pids)))


def test_a_missing_executable_raises_not_started(tmp_path: Path) -> None:
    with Supervisor(whole_process=False) as them, pytest.raises(NotStarted, match="died 5 times"):
        them.start([Program("x", "x", ("/no/such",), {}, tmp_path / "log", lambda: True)])


def test_complete_raises_if_the_program_fails(tmp_path: Path) -> None:
    with Supervisor(whole_process=False) as them:
        them.complete(python(tmp_path, "import sys; open(sys.argv[1], 'w').close()"))
        assert (tmp_path / "one").exists()
        with pytest.raises(NotStarted, match=r"one failed; see .*one\.log"):
            them.complete(python(tmp_path, "raise SystemExit(3)"))


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs root to change the user")
def test_the_death_signal_survives_the_change_of_user() -> None:
    """setuid clears it, and PostgreSQL runs as another user."""
    code = """
import subprocess, sys, time
from pathlib import Path
from workers.local.supervisor import Program, Supervisor
with Supervisor() as them:
    them.start([Program("s", "s", ("/bin/sleep", "60"), {}, Path(sys.argv[1]), lambda: True, user=65534)])
    print(them.process("s").pid, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, os.devnull], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert psutil.Process(pid).uids().real == 65534
        process.kill()
        until(lambda: not lives(pid))
