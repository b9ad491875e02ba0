"""Three machines on one computer, for tests of the loss of a whole machine. Linux, as root.

A machine is a set of namespaces: it has its own network, processes, mounts and host name, and a folder as its disk. All
machines and the place of the senders are connected to one bridge, which is in a network namespace of its own. A lost
machine sends no FIN and no RST: its cable is disconnected before its processes are killed.

No namespace has a name. The kernel removes it, with its interfaces, when its last process ends, and the processes are
killed when the test process ends, also after SIGKILL. So several runs can be active, and none leaves anything behind.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

from tests.support import ROOT
from tests.support.servers import remove_leftovers

MACHINES = (1, 2, 3)
SENDER = 9  # the place of the senders and of the simulated provider
BRIDGE = 0  # the place that connects all others
PREFIX = "headrace-machines-"
RECIPE = ROOT / "deploy" / "high-availability"  # the settings of the services
ABSENT = "needs Linux, root and the right to create namespaces (in a container: --privileged), with iproute2"
CLONE_NEWNET = 0x40000000
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")  # kills also a process that waits for a frozen one
_libc = ctypes.CDLL(None, use_errno=True)

# The first process of a machine. With SIGCHLD ignored, the kernel removes orphans that end: Patroni waits until its
# stopped PostgreSQL, an orphan, is gone. (dash cannot ignore SIGCHLD: `trap '' CHLD` does nothing.)
INIT = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
hostname "$1"
echo ready
exec env --ignore-signal=CHLD sleep infinity
"""
# Restarts a program that ends, as systemd does with Restart=always.
RESTARTING = 'while :; do "$@"; echo "headrace-test: ended with status $?, starts again"; sleep 1; done'


def ip(place: int) -> str:
    """The address of a machine or of the senders."""
    return f"10.77.0.{place}"


def available() -> bool:
    """Whether this user can create namespaces, and iproute2 is installed."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nsenter"):
        return False
    command = ("unshare", "--net", "--pid", "--fork", "--mount", "--uts", "--ipc", "mount", "--make-rprivate", "/")
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Machines:
    """The machines, within a `with`. The calling thread, and the threads that it starts, are at the senders' place."""

    def __init__(self) -> None:
        remove_leftovers(Path(tempfile.gettempdir()), PREFIX)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self.folder.chmod(0o755)  # the user of PostgreSQL must be able to enter it
        self._stack = contextlib.ExitStack()
        self._lost: set[int] = set()
        self._first: dict[int, int] = {}  # by place: the pid of the first process
        # By place: the processes outside its namespaces that wait for the ones inside.
        self._waiting: defaultdict[int, list[subprocess.Popen[bytes]]] = defaultdict(list)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            stack.callback(self._kill_all)
            self._hold(BRIDGE, "--net")
            self._in_bridge("link", "add", "br0", "type", "bridge")
            self._in_bridge("link", "set", "br0", "up")
            self._hold(SENDER, "--net")
            self._connect(SENDER)
            for machine in MACHINES:
                self.boot(machine)
            stack.enter_context(_network_of(self._first[SENDER]))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def working(self) -> tuple[int, ...]:
        """The machines that are not lost."""
        return tuple(machine for machine in MACHINES if machine not in self._lost)

    def disk(self, machine: int) -> Path:
        """The folder of a machine. It remains when the machine is lost."""
        return self.folder / f"m{machine}"

    def log(self, machine: int, program: str) -> Path:
        """The output of a program."""
        return self.disk(machine) / "log" / f"{program}.log"

    def boot(self, machine: int) -> None:
        """Starts a machine without programs, with the disk as it was."""
        for folder in ("log", "tmp"):
            (self.disk(machine) / folder).mkdir(parents=True, exist_ok=True)
        (self.disk(machine) / "tmp").chmod(0o1777)
        flags = ("--net", "--pid", "--fork", "--mount", "--uts", "--ipc", "--kill-child")
        self._hold(machine, *flags, command=("sh", "-c", INIT, "sh", f"m{machine}"))
        self._connect(machine)
        self._lost.discard(machine)

    def power_cut(self, machine: int) -> None:
        """Kills all processes of a machine, after it was disconnected."""
        self.cut_off(machine)
        self._kill(machine)

    def freeze(self, machine: int) -> None:
        """Stops every process of a machine. Its kernel still accepts connections, and nothing answers."""
        self._lost.add(machine)
        stopped: set[int] = set()
        while new := [one for one in self.processes(machine) if one not in stopped]:  # a process may have forked
            for pid in new:
                _signal(pid, signal.SIGSTOP)
            stopped |= set(new)

    def thaw(self, machine: int) -> None:
        """Continues every process of a frozen machine, and those that wait for one: they stop together with it."""
        for pid in (*self.processes(machine), *(one.pid for one in self._waiting[machine])):
            _signal(pid, signal.SIGCONT)
        self._lost.discard(machine)

    def cut_off(self, machine: int) -> None:
        """Disconnects a machine from all others. Its programs still reach each other."""
        self._lost.add(machine)
        self._in_bridge("link", "set", f"p{machine}", "down")

    def plug_in(self, machine: int) -> None:
        """Connects a machine that was cut off."""
        self._in_bridge("link", "set", f"p{machine}", "up")
        self._lost.discard(machine)

    def processes(self, machine: int) -> list[int]:
        """The pids of a machine's processes, as this process sees them."""
        namespace = _namespace(self._first[machine])
        return [pid for pid in psutil.pids() if _namespace(pid) == namespace]

    def kill(self, machine: int, name: str) -> None:
        """Kills the processes of a machine that have a name, as the kernel knows it. Their programs start again."""
        for pid in self.processes(machine):
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).name() == name:
                    _signal(pid, signal.SIGKILL)

    def command(self, machine: int, *command: str, user: str | None = None) -> tuple[str, ...]:
        """The command line that runs a command on a machine, as root or as another user."""
        enter = ("nsenter", "--target", str(self._first[machine]), "--net", "--pid", "--mount", "--uts", "--ipc")
        become = ("setpriv", "--reuid", user, "--regid", user, "--init-groups") if user else ()
        return (*enter, *become, *command)

    def start(
        self, machine: int, program: str, *command: str, environment: Mapping[str, str], user: str | None = None
    ) -> None:
        """Starts a program of a machine. It is started again when it ends, until the machine is lost."""
        line = (*DIE_WITH_PARENT, *self.command(machine, "sh", "-c", RESTARTING, "sh", *command, user=user))
        with self.log(machine, program).open("ab") as log:
            process = subprocess.Popen(
                line,
                env=self.environment(machine) | environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._waiting[machine].append(process)

    def run(
        self,
        machine: int,
        *command: str,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
        timeout: float = 60,
    ) -> str:
        """The output of a command on a machine, without errors. Raises CalledProcessError, and TimeoutExpired."""
        return subprocess.run(
            self.command(machine, *command, user=user),
            env=self.environment(machine) | (environment or {}),
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
            timeout=timeout,
        ).stdout

    def environment(self, machine: int) -> dict[str, str]:
        """The environment variables of every program of a machine."""
        folder = self.disk(machine)
        return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(folder), "TMPDIR": str(folder / "tmp")}

    def _hold(
        self, place: int, *flags: str, command: Sequence[str] = ("sh", "-c", "echo ready; exec sleep infinity")
    ) -> None:
        """Creates the namespaces of a place, with a first process that prints a line when it is ready."""
        process = subprocess.Popen(
            (*DIE_WITH_PARENT, "unshare", *flags, *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # unshare complains when its child is killed
            start_new_session=True,
        )
        self._waiting[place].append(process)
        assert process.stdout is not None
        with process.stdout as out:
            assert out.readline() == b"ready\n", f"cannot create place {place}"
        children = psutil.Process(process.pid).children()  # of unshare --fork
        self._first[place] = children[0].pid if children else process.pid

    def _connect(self, place: int) -> None:
        """Connects a place to the bridge.

        The hardware addresses of the others are permanent entries: packets to a lost machine vanish, as behind a
        router. With ARP the sender would get "no route to host" after 3 s.
        """
        first = self._first[place]
        with contextlib.suppress(subprocess.CalledProcessError):  # the kernel may already have removed the old end
            self._in_bridge("link", "del", f"p{place}")
        end = ("peer", "name", "eth0", "address", _hardware_address(place), "netns", str(first))
        self._in_bridge("link", "add", f"p{place}", "type", "veth", *end)
        self._in_bridge("link", "set", f"p{place}", "master", "br0", "up")
        _ip(first, "link", "set", "lo", "up")
        _ip(first, "addr", "add", f"{ip(place)}/24", "dev", "eth0")
        _ip(first, "link", "set", "eth0", "up")
        for other in {*MACHINES, SENDER} - {place}:
            entry = (ip(other), "lladdr", _hardware_address(other), "dev", "eth0", "nud", "permanent")
            _ip(first, "neigh", "replace", *entry)

    def _in_bridge(self, *arguments: str) -> None:
        _ip(self._first[BRIDGE], *arguments)

    def _kill_all(self) -> None:
        for place in list(self._first):
            self._kill(place)

    def _kill(self, place: int) -> None:
        """Kills the first process of a place, and with it all others of a machine."""
        _signal(self._first.pop(place), signal.SIGKILL)
        for process in self._waiting.pop(place):
            process.kill()
            process.wait(20)


def _ip(pid: int, *arguments: str) -> None:
    """Runs iproute2 in the network namespace of a process."""
    command = ("nsenter", "--target", str(pid), "--net", "ip", *arguments)
    subprocess.run(command, check=True, capture_output=True)


def _hardware_address(place: int) -> str:
    return f"02:77:00:00:00:0{place}"


def _namespace(pid: int) -> Path | None:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/ns/pid").readlink()
    return None


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def _network_of(pid: int) -> Iterator[None]:
    """Moves the calling thread to the network of a process. (os.setns requires Python 3.12.)"""
    with open("/proc/thread-self/ns/net", "rb") as before, open(f"/proc/{pid}/ns/net", "rb") as there:  # noqa: PTH123
        _enter_network(there.fileno())
        try:
            yield
        finally:
            _enter_network(before.fileno())


def _enter_network(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot enter a network namespace: {os.strerror(number)}")
