"""The simulated machines: how a lost one looks from outside, and that they leave nothing behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT, until
from tests.support.machines import ABSENT, Machines, available, ip

pytestmark = pytest.mark.skipif(not available(), reason=ABSENT)
PORT = 8000
# Answers each line with the same line, and creates a file on the disk of its machine.
ECHO = """
import pathlib, socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)
pathlib.Path.home().joinpath("written").touch()
socketserver.ThreadingTCPServer(("", 8000), Echo).serve_forever()
"""
FOREVER = """
import sys, time
from tests.support.machines import Machines
with Machines() as machines:
    machines.start(1, "sleep", "sleep", "600", environment={})
    time.sleep(0.3)
    machines.freeze(1)
    print(machines.folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """Three machines without programs."""
    with Machines() as machines:
        yield machines


def echoing(machines: Machines, machine: int) -> socket.socket:
    """A connection to a program on a machine that answers."""
    machines.start(machine, "echo", sys.executable, "-c", ECHO, environment={})
    until(lambda: answers(machine))
    connection = socket.create_connection((ip(machine), PORT), timeout=1)
    assert asked(connection) == b"hello\n"
    return connection


def asked(connection: socket.socket) -> bytes:
    connection.sendall(b"hello\n")
    return connection.recv(100)


def answers(machine: int) -> bool:
    """Whether a machine accepts a connection and answers within a second."""
    try:
        with socket.create_connection((ip(machine), PORT), timeout=1) as connection:
            return asked(connection) == b"hello\n"
    except OSError:
        return False


def test_a_frozen_machine_accepts_connections_and_answers_later(machines: Machines) -> None:
    """Breaks if a process of a frozen machine still runs, or a connection does not survive the freeze."""
    with echoing(machines, 1) as connection:
        machines.freeze(1)
        socket.create_connection((ip(1), PORT), timeout=1).close()
        with pytest.raises(TimeoutError):
            asked(connection)
        machines.thaw(1)
        assert connection.recv(100) == b"hello\n"


def test_a_machine_that_is_cut_off_is_silent(machines: Machines) -> None:
    """Breaks if packets to a machine without a cable are refused instead of lost, or its programs notice it."""
    with echoing(machines, 2) as connection:
        machines.cut_off(2)
        with pytest.raises(TimeoutError):
            socket.create_connection((ip(2), PORT), timeout=1)
        with pytest.raises(TimeoutError):
            asked(connection)
        machines.plug_in(2)
        assert connection.recv(100) == b"hello\n"


def test_a_power_cut_closes_no_connection_and_keeps_the_disk(machines: Machines) -> None:
    """Breaks if a killed machine sends a FIN or RST, keeps a process, or loses its disk."""
    with echoing(machines, 3) as connection:
        processes = [psutil.Process(pid) for pid in machines.processes(3)]
        machines.power_cut(3)
        assert psutil.wait_procs(processes, timeout=10)[1] == []
        with pytest.raises(TimeoutError):
            asked(connection)
        with pytest.raises(TimeoutError):
            socket.create_connection((ip(3), PORT), timeout=1)
        machines.boot(3)
        assert (machines.disk(3) / "written").exists()
        assert not answers(3)
        echoing(machines, 3).close()


def test_an_orphan_that_ends_is_gone(machines: Machines) -> None:
    """Breaks if the first process of a machine leaves zombies, for which Patroni waits when it stops PostgreSQL."""
    pid = machines.run(1, "sh", "-c", "sleep 0.1 >/dev/null & echo $!").strip()
    until(lambda: pid not in machines.run(1, "ps", "-eo", "pid=").split())


def test_a_killed_run_leaves_nothing(machines: Machines) -> None:
    """Breaks if processes of machines survive a SIGKILL of their test, even frozen, or if its folder is kept."""
    command = (sys.executable, "-c", FOREVER)
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as other:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().decode().strip())
        processes = psutil.Process(other.pid).children(recursive=True)
        assert {one.status() for one in processes} == {psutil.STATUS_SLEEPING, psutil.STATUS_STOPPED}
        other.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    assert folder.exists()
    with Machines():
        assert not folder.exists()
