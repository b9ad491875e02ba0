"""A real RabbitMQ for tests: in a temporary folder, on free ports. Tests can kill and freeze it, and fill its memory.

Debian's package is enough. The server is started without the package's wrapper, which requires root.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import amqp  # type: ignore[import-untyped]
import psutil

from app.broker.celery import make_celery
from app.broker.delays import delay_queue
from app.broker.lanes import LANES
from app.broker.rabbitmq_publisher import RabbitMQPublisher
from app.config.settings import Settings
from tests.support import until
from tests.support.servers import server_folder
from workers.local.ports import free_port
from workers.local.supervisor import Program, running

DIRECTORIES = ("/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
ABSENT = "RabbitMQ is not installed (Debian: apt-get install rabbitmq-server)"
# Before Ra 2.11 (RabbitMQ 3.13), the name of a new quorum queue reaches the disk half a second after its declaration.
# If the server is killed before that, the queue never has a leader again.
NAME_WRITE_SECONDS = 1.0
# Quorum queues update their counts for `rabbitmqctl list_queues` every 0.5 s instead of every 5 s.
COUNT_INTERVAL = "-rabbit quorum_tick_interval 500"


def binaries() -> Path | None:
    """The directory of RabbitMQ's programs; None if RabbitMQ or Erlang is not installed."""
    if shutil.which("erl") is None or shutil.which("epmd") is None:
        return None
    return next((Path(directory) for directory in DIRECTORIES if (Path(directory) / "rabbitmq-server").exists()), None)


class RabbitMQ:
    """One server. After a kill it restarts on the same port with its data."""

    def __init__(self, folder: Path, *, management: bool = False) -> None:
        found = binaries()
        assert found is not None, ABSENT
        self._binaries, self._folder = found, folder
        self._port, self._distribution, self._epmd_port = free_port(), free_port(), free_port()
        self._node = f"headrace{self._port}@localhost"
        self.vhost = "/"
        self.log = folder / "server.log"
        self._epmd_stack, self._server_stack = contextlib.ExitStack(), contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._epmd_process: subprocess.Popen[bytes] | None = None
        self._management_port = free_port() if management else None
        (folder / "plugins").write_text("[rabbitmq_management].\n" if management else "[].\n")
        # This file, also an empty one, replaces that of an installed server.
        listener = f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {self._management_port}\n"
        counts = "collect_statistics_interval = 500\n"  # by default the management API counts every 5 s
        (folder / "rabbitmq.conf").write_text(listener + counts if management else "")

    def __enter__(self) -> Self:
        # Starts epmd, Erlang's name server, first: RabbitMQ would start one as a daemon, which outlives the test.
        self._epmd_process = self._epmd_stack.enter_context(running(self._epmd_program()))
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._server_stack.close()
        finally:
            self._epmd_stack.close()

    @property
    def url(self) -> str:
        """The URL of the virtual host that is used."""
        return f"amqp://guest:guest@127.0.0.1:{self._port}/{self.vhost}"

    @property
    def pid(self) -> int:
        """The process id of the Erlang virtual machine."""
        assert self._process is not None
        return self._process.pid

    @property
    def management_url(self) -> str:
        """The URL of the management API."""
        return f"http://127.0.0.1:{self._management_port}"

    def processes(self) -> list[psutil.Process]:
        """The server, epmd, and all their child processes."""
        parents = [one for one in (self._epmd_process, self._process) if one is not None]
        found = [psutil.Process(one.pid) for one in parents if one.poll() is None]
        return found + [child for one in found for child in one.children(recursive=True)]

    def start(self) -> None:
        """Starts the server with its data, and waits until it accepts connections."""
        self._process = self._server_stack.enter_context(running(self._server()))

    def kill(self) -> None:
        """Kills the server with SIGKILL: data that it has not written is lost."""
        self._wait_for_names()
        os.kill(self.pid, signal.SIGKILL)
        self._server_stack.close()
        self._process = None

    def _wait_for_names(self) -> None:
        if self._process is not None and self._process.poll() is None:
            time.sleep(NAME_WRITE_SECONDS)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Pauses the server with SIGSTOP: the kernel still accepts connections. `kill` works on a paused server."""
        self._wait_for_names()
        os.kill(self.pid, signal.SIGSTOP)
        until(lambda: psutil.Process(self.pid).status() == psutil.STATUS_STOPPED, 5)  # until then it may still respond
        try:
            yield
        finally:
            if self._process is not None:
                os.kill(self.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def memory_alarm(self) -> Iterator[None]:
        """Sets off the memory alarm: the server accepts connections but reads no message."""
        self.control("set_vm_memory_high_watermark", "0.0001")
        try:
            yield
        finally:
            self.control("set_vm_memory_high_watermark", "0.4")

    def control(self, *arguments: str) -> str:
        """The output of a rabbitmqctl command."""
        command = (str(self._binaries / "rabbitmqctl"), "--quiet", "--node", self._node, *arguments)
        return subprocess.run(
            command, env=self._environment(), capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def table(self, *arguments: str) -> list[list[str]]:
        """The rows of a rabbitmqctl list command."""
        return [row.split("\t") for row in self.control("--no-table-headers", *arguments).splitlines() if row]

    def connect(self) -> Any:
        """A new connection, for a `with` statement."""
        connection = amqp.Connection(
            f"127.0.0.1:{self._port}",
            "guest",
            "guest",
            virtual_host=self.vhost,
            connect_timeout=5,
            read_timeout=5,
        )
        connection.connect()
        return connection

    def ready_count(self, lane: str = "live") -> int:
        """The number of ready messages in a queue, without unacknowledged ones."""
        with self.connect() as connection:
            return int(connection.channel().queue_declare(lane, passive=True).message_count)

    def has(self, queue: str) -> bool:
        """Whether a queue with this name exists."""
        try:
            self.ready_count(queue)
        except amqp.NotFound:
            return False
        return True

    def empty(self) -> None:
        """Deletes all messages, also delayed ones, and those that the consumers of a killed worker return.

        Deleting the queues instead fails now and then: RabbitMQ 3.10 rejects messages for a quorum queue that was just
        declared again.
        """
        for lane in LANES:
            for queue in (lane, delay_queue(lane).name):
                until(lambda queue=queue: self._is_purged(queue))

    def _is_purged(self, queue: str) -> bool:
        """Whether the queue has no messages and no consumers, after its messages were deleted."""
        try:
            with self.connect() as connection:
                channel = connection.channel()
                channel.queue_purge(queue)
                declared = channel.queue_declare(queue, passive=True)
        except amqp.NotFound:
            return True
        return not (declared.message_count or declared.consumer_count)

    @contextlib.contextmanager
    def without_queues(self) -> Iterator[None]:
        """Uses a new virtual host until the block ends.

        Deleting the queues instead fails now and then: RabbitMQ 3.10 cannot start a quorum queue (`cluster_not_formed`)
        that was deleted and declared again at once, and keeps it in this state.
        """
        before, vhost = self.vhost, f"tests-{uuid.uuid4()}"
        self.control("add_vhost", vhost)
        self.control("set_permissions", "--vhost", vhost, "guest", ".*", ".*", ".*")
        self.vhost = vhost
        try:
            yield
        finally:
            self.vhost = before
            self.control("delete_vhost", vhost)

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self._folder),  # contains the cookie that authenticates rabbitmqctl
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_BASE": str(self._folder),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "data"),
            "RABBITMQ_LOG_BASE": str(self._folder),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-kernel inet_dist_use_interface {{127,0,0,1}} {COUNT_INTERVAL}",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_PID_FILE": str(self._folder / "pid"),
            "RABBITMQ_ALLOW_INPUT": "1",  # the script execs the server, instead of staying its parent
        }

    def _epmd_program(self) -> Program:
        return Program(
            group="epmd",
            name="epmd",
            command=(str(shutil.which("epmd")), "-port", str(self._epmd_port), "-address", "127.0.0.1"),
            environment=self._environment(),
            log=self._folder / "epmd.log",
            ready=lambda: _listens(self._epmd_port),
            stop_signal=signal.SIGKILL,
        )

    def _server(self) -> Program:
        return Program(
            group="broker",
            name="rabbitmq",
            command=(str(self._binaries / "rabbitmq-server"), "-noinput"),
            environment=self._environment(),
            log=self.log,
            ready=self._accepts_connections,
            stop_signal=signal.SIGKILL,
            cwd=self._folder,
        )

    def _accepts_connections(self) -> bool:
        try:
            with self.connect() as connection:
                return bool(connection.connected)
        except (OSError, amqp.AMQPError):
            return False


@contextlib.contextmanager
def rabbitmq(*, management: bool = False) -> Iterator[RabbitMQ]:
    """Runs a server, with its management API if wanted, until the block ends. It leaves no file and no process."""
    with server_folder("rabbitmq") as folder:
        with RabbitMQ(folder, management=management) as server:
            yield server
            processes = server.processes()
        assert psutil.wait_procs(processes, timeout=10)[1] == []


@contextlib.contextmanager
def publishing(url: str, *, confirms: bool = True) -> Iterator[RabbitMQPublisher]:
    """A publisher as in each process of the endpoint; `confirms=False` is Celery's default."""
    celery = make_celery(Settings(broker_url=url), "publisher")
    celery.conf.broker_transport_options = celery.conf.broker_transport_options | {"confirm_publish": confirms}
    publisher = RabbitMQPublisher(celery)
    try:
        yield publisher
    finally:
        publisher.close(graceful=False)
        celery.close()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
