"""A real RabbitMQ for tests: in a temporary folder, on free ports, that can be killed, frozen and filled.

Debian's package is enough, and is started past its wrapper, which wants to be root: any user can run it.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import amqp  # type: ignore[import-untyped]
import psutil

from app.broker.delays import DELAYS, delay_queue
from app.broker.lanes import LANES
from tests.support import until
from workers.local.ports import free_port
from workers.local.supervisor import Program, running

PLACES = ("/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
ABSENT = "RabbitMQ is not installed (Debian: apt-get install rabbitmq-server)"
# Before Ra 2.11 (RabbitMQ 3.13) the name of a new quorum queue is on disk half a second after it was declared. Killed
# before, the server starts again with a queue that has no leader, for good.
NAMED_SECONDS = 1.0
# How often a quorum queue counts its messages for `rabbitmqctl list_queues`: every half a second instead of every five.
COUNT_OFTEN = "-rabbit quorum_tick_interval 500"


def binaries() -> Path | None:
    """Where RabbitMQ's programs are, if they and Erlang are installed."""
    if shutil.which("erl") is None or shutil.which("epmd") is None:
        return None
    return next((Path(place) for place in PLACES if (Path(place) / "rabbitmq-server").exists()), None)


class RabbitMQ:
    """One server. Its data stay when it is killed, and it starts again with them on the same port."""

    def __init__(self, folder: Path) -> None:
        found = binaries()
        assert found is not None, ABSENT
        self._binaries, self._folder = found, folder
        self._port, self._distribution, self._epmd = free_port(), free_port(), free_port()
        self._node = f"headrace{self._port}@localhost"
        self.url = f"amqp://guest:guest@127.0.0.1:{self._port}//"
        self.log = folder / "server.log"
        self._stay, self._life = contextlib.ExitStack(), contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._name_server_process: subprocess.Popen[bytes] | None = None
        (folder / "plugins").write_text("[].\n")
        (folder / "rabbitmq.conf").write_text("")  # no settings of the machine's own server

    def __enter__(self) -> Self:
        # Erlang's name server would make itself a daemon; one of our own is there first.
        self._name_server_process = self._stay.enter_context(running(self._name_server()))
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._life.close()
        finally:
            self._stay.close()

    @property
    def pid(self) -> int:
        """The Erlang machine itself."""
        assert self._process is not None
        return self._process.pid

    def family(self) -> list[psutil.Process]:
        """Every process that is there because of it."""
        heads = [one for one in (self._name_server_process, self._process) if one is not None]
        found = [psutil.Process(one.pid) for one in heads if one.poll() is None]
        return found + [child for one in found for child in one.children(recursive=True)]

    def start(self) -> None:
        """Starts it, with the data it had, and waits until it takes connections."""
        self._process = self._life.enter_context(running(self._server()))

    def kill(self) -> None:
        """kill -9: what it has not written is lost."""
        self._settle()
        os.kill(self.pid, signal.SIGKILL)
        self._life.close()
        self._process = None

    def _settle(self) -> None:
        if self._process is not None and self._process.poll() is None:
            time.sleep(NAMED_SECONDS)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """It accepts connections, as the kernel does it for it, and says nothing. It may be killed in this state."""
        self._settle()
        os.kill(self.pid, signal.SIGSTOP)
        until(lambda: psutil.Process(self.pid).status() == psutil.STATUS_STOPPED, 5)  # until then it may answer
        try:
            yield
        finally:
            if self._process is not None:
                os.kill(self.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def short_of_memory(self) -> Iterator[None]:
        """Its memory alarm is on: it takes connections and reads no message."""
        self.control("set_vm_memory_high_watermark", "0.0001")
        try:
            yield
        finally:
            self.control("set_vm_memory_high_watermark", "0.4")

    def control(self, *arguments: str) -> str:
        """What rabbitmqctl answers."""
        command = (str(self._binaries / "rabbitmqctl"), "--quiet", "--node", self._node, *arguments)
        return subprocess.run(
            command, env=self._environment(), capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def table(self, *arguments: str) -> list[list[str]]:
        """The rows of one of rabbitmqctl's lists."""
        return [row.split("\t") for row in self.control("--no-table-headers", *arguments).splitlines() if row]

    def connect(self) -> Any:
        """A connection of the test's own, to be used in a `with`."""
        connection = amqp.Connection(f"127.0.0.1:{self._port}", "guest", "guest", connect_timeout=5, read_timeout=5)
        connection.connect()
        return connection

    def waiting(self, lane: str = "live") -> int:
        """How many messages of a lane nobody holds."""
        with self.connect() as connection:
            return int(connection.channel().queue_declare(lane, passive=True).message_count)

    def has(self, queue: str) -> bool:
        """Whether there is a queue of this name."""
        try:
            self.waiting(queue)
        except amqp.NotFound:
            return False
        return True

    def empty(self) -> None:
        """Removes the lanes, and what is in them or waits for its time.

        The queues in which that waits stay: deleted in the moment they are led again, after a start, they end what
        returns dead letters, for good (RabbitMQ 3.10).
        """
        with self.connect() as connection:
            for room in (delay_queue(lane, wait).name for lane in LANES for wait in DELAYS):
                with contextlib.suppress(amqp.NotFound), connection.channel() as channel:
                    channel.queue_purge(room)
            channel = connection.channel()
            for lane in LANES:
                channel.queue_delete(lane)
                channel.exchange_delete(lane)

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self._folder),  # with the cookie by which rabbitmqctl is known
            "ERL_EPMD_PORT": str(self._epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_BASE": str(self._folder),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "data"),
            "RABBITMQ_LOG_BASE": str(self._folder),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-kernel inet_dist_use_interface {{127,0,0,1}} {COUNT_OFTEN}",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_PID_FILE": str(self._folder / "pid"),
            "RABBITMQ_ALLOW_INPUT": "1",  # the script becomes the server, instead of watching it
        }

    def _name_server(self) -> Program:
        return Program(
            group="epmd",
            name="epmd",
            command=(str(shutil.which("epmd")), "-port", str(self._epmd), "-address", "127.0.0.1"),
            environment=self._environment(),
            log=self._folder / "epmd.log",
            ready=lambda: _listens(self._epmd),
            stop_signal=signal.SIGKILL,
        )

    def _server(self) -> Program:
        return Program(
            group="broker",
            name="rabbitmq",
            command=(str(self._binaries / "rabbitmq-server"), "-noinput"),
            environment=self._environment(),
            log=self.log,
            ready=self._answers,
            stop_signal=signal.SIGKILL,
            cwd=self._folder,
        )

    def _answers(self) -> bool:
        try:
            with self.connect() as connection:
                return bool(connection.connected)
        except (OSError, amqp.AMQPError):
            return False


@contextlib.contextmanager
def rabbitmq() -> Iterator[RabbitMQ]:
    """A server for as long as the block lasts. It leaves no file and no process."""
    folder = Path(tempfile.mkdtemp(prefix="headrace-rabbitmq-"))
    try:
        with RabbitMQ(folder) as server:
            yield server
            family = server.family()
        assert psutil.wait_procs(family, timeout=10)[1] == []
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
