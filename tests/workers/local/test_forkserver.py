"""The fork server, with real processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import ENVIRONMENT, ROOT, until
from tests.support.processes import lives, memory_of
from workers.local import forkserver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a kernel that gives orphans to the supervisor")

SECRET = "the-secret-of-one-child"
# A supervisor of a fork server and one child. It writes every change of pids down.
SUPERVISED = """
import logging, os, sys
from pathlib import Path
from dataclasses import replace
from app.commands import own
from workers.local import forkserver
from workers.local.supervisor import Program, Supervisor
logging.basicConfig(level=logging.INFO, format="%(message)s")
folder = Path(sys.argv[1])
environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ["PYTHONPATH"], "HEADRACE_DATA_DIR": str(folder)}
forkserver.FORK_SECONDS = float(sys.argv[3])
server = forkserver.ForkServer(environment, folder / "forkserver.log", folder / "forkserver.ready")
child = Program("child", "child", own("tests.support.forked", str(folder / "child")),
                environment | {"SECRET": sys.argv[2]}, folder / "child.log", (folder / "child").exists,
                before_start=lambda: (folder / "child").unlink(missing_ok=True), fork=server.fork)
other = replace(child, group="other", name="other", command=own("tests.support.forked", str(folder / "other")),
                environment=environment, log=folder / "other.log", ready=(folder / "other").exists)
with Supervisor() as them:
    them.start([server.program])
    them.start([child, other])
    def write(pids):
        (folder / "new").write_text(repr(pids))
        return bool((folder / "new").rename(folder / "pids"))
    write(them.pids())
    them.run(write)
"""


class Family:
    """The processes of one supervisor."""

    def __init__(self, folder: Path, fork_seconds: float) -> None:
        self.folder = folder
        command = [sys.executable, "-c", SUPERVISED, str(folder), SECRET, str(fork_seconds)]
        with (folder / "stderr").open("wb") as errors:
            self.process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=errors)
        until((folder / "pids").exists, 60)

    def pid(self, group: str) -> int:
        found: dict[str, list[int]] = json.loads((self.folder / "pids").read_text().replace("'", '"'))
        return next(iter(found[group]), 0)

    def report(self, name: str) -> dict[str, object]:
        """The child's findings about itself."""
        until((self.folder / name).exists, 20)
        return dict(json.loads((self.folder / name).read_text()))


@contextlib.contextmanager
def started(folder: Path, fork_seconds: float = forkserver.FORK_SECONDS) -> Iterator[Family]:
    one = Family(folder, fork_seconds)
    pids = [one.pid(group) for group in ("forkserver", "child", "other")]
    yield one
    one.process.terminate()
    assert one.process.wait(20) is not None
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    """One family for all tests, of which the last one kills its supervisor."""
    with started(tmp_path_factory.mktemp("family")) as one:
        yield one


def test_a_child_is_a_process_of_the_supervisor(family: Family) -> None:
    """Breaks if a child misses its arguments, its environment, its log or a session of its own."""
    pid, report = family.pid("child"), family.report("child")
    assert report["pid"] == report["session"] == pid
    assert report["parent"] == family.process.pid
    assert report["secret"] == SECRET
    assert report["threads"] == 1
    assert (family.folder / "child.log").read_text() == "written by the child\n"
    assert psutil.Process(pid).cmdline()[:5] == [sys.executable, "-P", "-m", "tests.support.forked", report["file"]]


def test_children_share_memory(family: Family) -> None:
    """Breaks if a child imports the libraries again: each worker then costs 64 MB."""
    assert family.report("child")["imported"] is True
    found = psutil.Process(family.pid("child")).memory_full_info()
    assert found.uss < found.rss / 2


def test_a_secret_is_only_in_the_memory_of_its_process(family: Family) -> None:
    """Breaks if a child can read the secrets of another one, for example Flower the encryption key."""
    assert SECRET.encode() in memory_of(family.pid("child"))
    for group in ("forkserver", "other"):
        assert SECRET.encode() not in memory_of(family.pid(group)), group
        assert "SECRET" not in psutil.Process(family.pid(group)).environ()


def test_a_killed_child_is_forked_again(family: Family) -> None:
    """Breaks if a child that dies stays away, or its death stops others."""
    killed, server, other = (family.pid(group) for group in ("child", "forkserver", "other"))
    os.kill(killed, signal.SIGKILL)
    until(lambda: family.pid("child") not in (0, killed))
    assert (family.pid("forkserver"), family.pid("other")) == (server, other)
    assert family.report("child")["imported"] is True
    assert f"child (pid {killed}) ended with status -9" in (family.folder / "stderr").read_text()


def test_children_outlive_the_fork_server(family: Family) -> None:
    """Breaks if kill -9 of the fork server stops workers, or none can be started until it runs again."""
    server, child, other = (family.pid(group) for group in ("forkserver", "child", "other"))
    os.kill(server, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    until(lambda: family.pid("child") not in (0, child))
    until(lambda: family.pid("forkserver") not in (0, server))
    assert family.pid("other") == other
    assert lives(other)


def test_a_stopped_fork_server_delays_no_start_for_long(tmp_path: Path) -> None:
    """Breaks if a fork server that does not answer blocks restarts."""
    with started(tmp_path, fork_seconds=1) as one:
        killed = one.pid("child")
        os.kill(one.pid("forkserver"), signal.SIGSTOP)
        os.kill(killed, signal.SIGKILL)
        until(lambda: one.pid("child") not in (0, killed), 30)
        assert one.report("child")["imported"] is False  # it was started as a command
        os.kill(one.pid("forkserver"), signal.SIGCONT)


def test_a_killed_supervisor_leaves_no_child(family: Family) -> None:
    """Breaks if forked processes do not get the death signal of their supervisor."""
    pids = [family.pid(group) for group in ("forkserver", "child", "other")]
    family.process.kill()
    until(lambda: not any(map(lives, pids)))
