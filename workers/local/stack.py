"""`headrace up`: all processes on one machine, with embedded services and generated secrets where none are set."""

import contextlib
import errno
import functools
import http.client
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import click

from app.accounts import Account, hash_password
from app.broker.lanes import LANES
from app.commands import own, process_alive
from app.config.settings import Settings
from app.errors import Misconfigured
from app.observability.metrics import METRICS_FOLDER
from workers.local import embedded_postgres, embedded_valkey, ports
from workers.local.attach import LOCK, STACK, try_lock
from workers.local.files import user_name, wait_for_space, write_secret
from workers.local.forkserver import ForkServer
from workers.local.secrets import GENERATED_SECRETS, SECRET_VARIABLES, WRITER, load_secrets, withheld
from workers.local.supervisor import Fork, Pids, Program, Slot, Supervisor

SERVICES, PROGRAMS = range(2)  # stages, which are stopped in reverse order
FORKED = ("migrate", "worker", "beat", "etl", "console")  # the fork server has imported their libraries
ONE_PROCESS_LANES = ("download", "maintenance", "notify", "derive")
PGPASS = "pgpass"
METRICS, METRICS_PREFIX = "metrics", "headrace-metrics-"
MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it is made with a random name and mode 0700
LOCK_SECONDS = 40.0  # longest shutdown of the servers of a killed stack
EVERY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - the address to connect to

_log = logging.getLogger(__name__)


def up(
    settings: Settings,
    environment: Mapping[str, str],
    data_dir: Path,
    *,
    port: int | None,
    workers: int | None,
    parent: int | None,
) -> None:
    """Runs everything until SIGTERM or SIGINT, or until process `parent` has ended. Raises Misconfigured or NotStarted.

    The port is reserved before any service starts: starting PostgreSQL and migrating take seconds.
    """
    data_dir = data_dir.absolute()
    wait_for_space(data_dir)
    _make_data_dir(data_dir)
    # The lock is released last, after every process of this stack has ended.
    with (
        contextlib.suppress(KeyboardInterrupt),
        _locked(data_dir) as lock,
        _held_port(settings, environment, port) as held,
        contextlib.ExitStack() as at_the_end,
        Supervisor(parent=parent) as supervisor,
    ):
        at_the_end.callback(_remove_metrics_folder, data_dir)
        try:
            (data_dir / STACK).unlink(missing_ok=True)  # of a killed stack
            stack = _Stack(settings, environment, data_dir, supervisor, at_the_end)
            stack.start_broker(lock)
            stack.start_endpoint(held)
            stack.start_database(lock)
            stack.migrate()
            stack.start_workers(workers or os.cpu_count() or 1)
            stack.write(supervisor.pids())
            stack.greet()
            supervisor.run(stack.update)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise _unusable(data_dir, error) from None
            raise
        finally:
            (data_dir / STACK).unlink(missing_ok=True)


def _make_data_dir(data_dir: Path) -> None:
    try:
        if not data_dir.is_dir():
            data_dir.mkdir(parents=True)
            # As root, PostgreSQL's user must be able to enter. Secrets are in files of mode 0600.
            data_dir.chmod(0o755 if os.geteuid() == 0 else 0o700)
        for name in ("log", "run"):
            (data_dir / name).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _unusable(data_dir, error) from None


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[int]:
    """Locks the folder. The servers inherit the lock: a new stack does not start while a killed one's servers write."""
    lock = _open_lock(data_dir)
    began = time.monotonic()
    try:
        while not try_lock(lock):
            holder, waited = os.pread(lock, 20, 0).decode(), time.monotonic() - began
            # Wait at least 1 s: `attach` also holds the lock for a moment.
            if waited > LOCK_SECONDS or (waited > 1 and holder and process_alive(int(holder))):
                raise Misconfigured(f"another `headrace up` (pid {holder or 'unknown'}) runs in {data_dir}")
            time.sleep(0.1)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _open_lock(data_dir: Path) -> int:
    file = data_dir / LOCK
    with contextlib.suppress(FileNotFoundError):
        if (owner := file.stat().st_uid) != os.geteuid():
            raise Misconfigured(
                f"{data_dir} belongs to the stack of {user_name(owner)}; run this as that user, or choose another "
                "--data-dir",
                setting="HEADRACE_DATA_DIR",
            )
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _unusable(data_dir, error) from None


def _new_metrics_folder(data_dir: Path) -> Path:
    """An empty folder for the processes' metrics, linked from the data directory. In memory if possible.

    The Prometheus client maps sparse files: on a full disk the first write to a new page kills the process with SIGBUS.
    The endpoint would then answer nothing instead of 503 (measured: 71 of 72 requests had no response).
    """
    _remove_metrics_folder(data_dir)
    link = data_dir / METRICS
    if os.access(MEMORY, os.W_OK):
        link.symlink_to(tempfile.mkdtemp(prefix=METRICS_PREFIX, dir=MEMORY))
    else:
        link.mkdir(mode=0o700)
    return link


def _remove_metrics_folder(data_dir: Path) -> None:
    link = folder = data_dir / METRICS
    if link.is_symlink():
        folder = link.readlink()
        link.unlink()
        if folder.parent != MEMORY or not folder.name.startswith(METRICS_PREFIX):
            return
    shutil.rmtree(folder, ignore_errors=True)


def _unusable(data_dir: Path, error: OSError) -> Misconfigured:
    return Misconfigured(f"{data_dir} cannot be used: {error.strerror}", setting="HEADRACE_DATA_DIR")


def _held_port(settings: Settings, environment: Mapping[str, str], asked: int | None) -> socket.socket:
    """Reserves the endpoint's port: the one in --port or HEADRACE_PORT, otherwise the default or a free one."""
    asked_by = "--port" if asked else "HEADRACE_PORT" if environment.get("HEADRACE_PORT", "").strip() else ""
    return ports.held_port(settings.host, asked or settings.port, strict=asked_by)


def url_of(host: str, port: int) -> str:
    """The URL at which this machine reaches a server that listens on `host`."""
    name = EVERY_ADDRESS.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(parts.netloc, timeout=2)) as connection:
        try:
            connection.request("GET", parts.path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


@dataclass
class _Stack:
    settings: Settings
    given: Mapping[str, str]  # the environment of `headrace up`
    data_dir: Path
    supervisor: Supervisor
    at_the_end: contextlib.ExitStack

    def __post_init__(self) -> None:
        self.secrets = load_secrets(self.data_dir, self.given)
        metrics = _new_metrics_folder(self.data_dir)
        own = {variable: self.secrets[name] for name, variable, _ in GENERATED_SECRETS if variable}
        folders = {METRICS_FOLDER: str(metrics), "HEADRACE_DATA_DIR": str(self.data_dir)}
        self.environment = {**self.given, **own, **folders}
        self.psql = 'psql "$DATABASE_URL"'
        self.web = self.flower = self.console = self.operations = ""
        self.is_outdated = False
        self.fork: Fork | None = None
        self.forkserver: Sequence[Slot] = ()
        self.launched: list[Slot] = []

    def start_broker(self, lock: int) -> None:
        """Starts the broker if none is configured, and the fork server, which imports its libraries meanwhile.

        A service gets a free port and inherits the lock on the data.
        """
        self._start_forkserver()
        broker = self.settings.broker_url or self.settings.redis_url
        if broker is None or not self.settings.has_redis:
            name = "broker" if broker is None else "redis"  # next to RabbitMQ, for the shared rate limits
            program, redis_url = embedded_valkey.valkey(
                self.data_dir / name, self.secrets["broker_password"], self._log_of(name)
            )
            broker = broker or redis_url
            self.environment["REDIS_URL"] = redis_url
            program = replace(program, group=name, name=name, pass_fds=(lock,))
            self.supervisor.wait(self.supervisor.launch([program], stage=SERVICES))
        self.broker_url = self.environment["BROKER_URL"] = broker

    def _start_forkserver(self) -> None:
        if sys.platform != "linux":
            return
        environment = {name: value for name, value in self.environment.items() if name not in SECRET_VARIABLES}
        server = ForkServer(environment, self._log_of("forkserver"), self.data_dir / "run" / "forkserver.ready")
        self.fork = server.fork
        self.forkserver = self.supervisor.launch([server.program], stage=SERVICES)

    def start_endpoint(self, web: socket.socket) -> None:
        """Launches the endpoint and Flower, which do not need the database. They import their libraries meanwhile."""
        wanted = self.settings
        self.web = self._listen_at("", wanted.host, web)
        with contextlib.ExitStack() as choosing:  # until then the ports are reserved, so that they differ
            flower = choosing.enter_context(ports.held_port(wanted.flower_host, wanted.flower_port))
            self.flower = self._listen_at("FLOWER_", wanted.flower_host, flower)
            # This port stays reserved like the endpoint's, because the console also listens with SO_REUSEPORT.
            console = self.at_the_end.enter_context(ports.held_port(wanted.console_host, wanted.console_port))
            self.console = self._listen_at("CONSOLE_", wanted.console_host, console)
            if wanted.operations_port:  # 0: no server for /metrics and /readyz
                operations = choosing.enter_context(ports.held_port(wanted.operations_host, wanted.operations_port))
                self.operations = self._listen_at("OPERATIONS_", wanted.operations_host, operations)
        # Flower is stopped with SIGKILL: it has no state and no children, and a clean exit waits for threads that may
        # hang. Its metrics have worker names as labels, so they stay on its own page.
        flower_program = self._http_program("flower", f"{self.flower}/healthcheck")
        environment = {name: value for name, value in flower_program.environment.items() if name != METRICS_FOLDER}
        programs = [
            self._http_program("web", *(f"{url}/readyz" for url in (self.web, self.operations) if url)),
            replace(flower_program, environment=environment, stop_signal=signal.SIGKILL),
        ]
        self.launched += self.supervisor.launch(programs, stage=PROGRAMS)

    def _listen_at(self, name: str, host: str, reserved: socket.socket) -> str:
        """Sets the address of a server in the environment. Returns its URL."""
        port = reserved.getsockname()[1]
        self.environment |= {f"HEADRACE_{name}HOST": host, f"HEADRACE_{name}PORT": str(port)}
        return url_of(host, port)

    def start_database(self, lock: int) -> None:
        """Starts PostgreSQL if none is configured; it inherits the lock."""
        database = self.settings.database_url
        if database is None:
            program, database = embedded_postgres.postgres(
                self.data_dir / "postgres", self.secrets["postgres_password"], self._log_of("postgres")
            )
            self._write_pgpass(database, Path(program.command[0]).with_name("psql"))
            self.supervisor.wait(self.supervisor.launch([replace(program, pass_fds=(lock,))], stage=SERVICES))
        self.database_url = self.environment["DATABASE_URL"] = database

    def migrate(self) -> None:
        """Migrates as the owner. After that, the processes log in to the embedded PostgreSQL as a writer.

        A DATABASE_URL of the operator is used as it is. stack.json has the owner's URL, for the operator's commands.
        """
        self.supervisor.wait(self.forkserver)  # in an existing folder PostgreSQL is ready first
        migration = self._program("migrate", "migrate", ("migrate",), lambda: True)
        if self.settings.database_url is not None:
            self.supervisor.complete(migration)
            return
        password = self.secrets["postgres_writer_password"]
        self.supervisor.complete(replace(migration, environment={**migration.environment, WRITER: password}))
        self.environment["DATABASE_URL"] = embedded_postgres.writer_url(self.database_url, password)

    def start_workers(self, workers: int) -> None:
        """Starts the workers, beat, the console and, if configured, the pipeline consumer; waits for all programs."""
        counts = {lane: 1 if lane in ONE_PROCESS_LANES else workers for lane in LANES}
        lanes = [(lane, number) for lane, count in counts.items() for number in range(1, count + 1)]
        programs = [
            *(self._file_program(lane, f"{lane}-{number}", "worker", "--lane", lane) for lane, number in lanes),
            *([self._file_program("etl", "etl", "etl")] if self.settings.etl_url else []),
            self._file_program("beat", "beat", "beat"),
            self._console_program(),
        ]
        self.launched += self.supervisor.launch(programs, stage=PROGRAMS)
        self.supervisor.wait(self.launched)

    def write(self, pids: Pids) -> None:
        """Writes stack.json, which other commands read."""
        stack = {
            "web": self.web,
            "operations": self.operations,
            "flower": self.flower,
            "flower_auth": self.secrets["flower_auth"],
            "console": self.console,
            "console_auth": self.secrets["console_auth"],
            "database_url": self.database_url,
            "broker_url": self.broker_url,
            "redis_url": self.environment.get("REDIS_URL", ""),
            # During a rotation there are several; one is enough.
            "junction_webhook_secret": self.secrets["junction_webhook_secret"].split(",")[0].strip(),
            "terra_signing_secret": self.secrets["terra_signing_secret"].split(",")[0].strip(),
            "processes": pids,
        }
        write_secret(self.data_dir / STACK, json.dumps(stack, indent=1))

    def update(self, pids: Pids) -> bool:
        """As `write`. False on a full disk: then stack.json names ended processes until the next attempt."""
        try:
            self.write(pids)
        except OSError as error:
            if not self.is_outdated:
                _log.warning("%s cannot be updated: %s", self.data_dir / STACK, error.strerror)
            self.is_outdated = True
        else:
            self.is_outdated = False
        return not self.is_outdated

    def greet(self) -> None:
        click.echo(
            f"Headrace is ready.\n"
            f"  webhooks  {self.web}/webhooks/junction and {self.web}/webhooks/terra\n"
            f"            (signing secrets: {self.data_dir / STACK})\n"
            f"  Flower    {self.flower} (login: flower_auth in {self.data_dir / STACK})\n"
            f"  console   {self.console} (login: console_auth in {self.data_dir / STACK})\n"
            f"  database  {self.psql}\n"
            f"  logs      {self.data_dir / 'log'}\n"
            f"Press Ctrl-C to stop."
        )

    def _log_of(self, name: str) -> Path:
        return self.data_dir / "log" / f"{name}.log"

    def _program(self, group: str, name: str, arguments: tuple[str, ...], ready: Callable[[], bool]) -> Program:
        command, unneeded = own("workers.cli", *arguments), withheld(arguments)
        environment = {name: value for name, value in self.environment.items() if name not in unneeded}
        fork = self.fork if arguments[0] in FORKED else None
        return Program(group, name, command, environment, self._log_of(name), ready, fork=fork)

    def _http_program(self, name: str, *urls: str) -> Program:
        """Ready when every URL answers 200."""
        return self._program(name, name, (name,), lambda: all(map(_answers, urls)))

    def _console_program(self) -> Program:
        """The console, with the operator's accounts and a generated one, which has every role."""
        name, _, password = self.secrets["console_auth"].partition(":")
        others = [one for one in self.settings.console_users if one.name != name]
        accounts = [*others, Account(name, hash_password(password), "privacy")]
        program = self._program("console", "console", ("console",), lambda: _answers(f"{self.console}/livez"))
        users = ",".join(one.line for one in accounts)
        # The server instead of the command, which would start another interpreter and share no memory.
        command = own("workers.console", *([self.operations] if self.operations else []))
        return replace(program, command=command, environment={**program.environment, "HEADRACE_CONSOLE_USERS": users})

    def _file_program(self, group: str, name: str, *arguments: str) -> Program:
        """Ready when it has created its HEADRACE_READY_FILE."""
        file = self.data_dir / "run" / f"{name}.ready"
        program = self._program(group, name, arguments, file.exists)
        environment = {**program.environment, "HEADRACE_READY_FILE": str(file)}
        return replace(program, environment=environment, before_start=functools.partial(file.unlink, missing_ok=True))

    def _write_pgpass(self, database_url: str, psql: Path) -> None:
        """Writes a password file for psql, so that the password appears on no command line."""
        url, file = urlsplit(database_url), self.data_dir / PGPASS
        name = url.path.lstrip("/")
        write_secret(file, f"{url.hostname}:{url.port}:{name}:{url.username}:{url.password}\n")
        command = shlex.join((str(psql), "-h", url.hostname or "", "-p", str(url.port), "-U", url.username or "", name))
        self.psql = f"PGPASSFILE={shlex.quote(str(file))} {command}"
