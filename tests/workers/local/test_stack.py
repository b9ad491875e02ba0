"""The data directory of `headrace up`, and how other commands find it. tests/end_to_end runs the whole stack."""

import base64
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from app.config.settings import Settings, load
from app.errors import Misconfigured
from workers.local import attach, secrets, stack
from workers.local.supervisor import NotStarted, Supervisor
from workers.local.temporary import running_stack

STACK = {
    "web": "http://127.0.0.1:1",
    "flower": "http://127.0.0.1:2",
    "flower_auth": "headrace:of-the-stack",
    "database_url": "postgresql://headrace:p@127.0.0.1:3/headrace",
    "broker_url": "redis://:p@127.0.0.1:4/0",
    "junction_webhook_secret": "whsec_" + base64.b64encode(b"j" * 24).decode(),
    "terra_signing_secret": "t" * 32,
    "processes": {},
}


NOBODY = 65534


def as_nobody(*calls: Callable[[], object]) -> list[str]:
    """The texts of the errors that the calls raise in a process of user nobody."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with os.fdopen(writing, "w") as answer:
            for call in calls:
                try:
                    call()
                except Misconfigured as error:
                    print(error, file=answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        texts = answer.read().splitlines()
    os.waitpid(child, 0)
    return texts


@pytest.fixture
def running(tmp_path: Path):
    """The data directory of a running stack."""
    secrets.load_secrets(tmp_path, {})
    (tmp_path / "stack.json").write_text(json.dumps(STACK))
    with stack._locked(tmp_path):
        yield tmp_path


def test_secrets_are_generated_once(tmp_path: Path) -> None:
    made = secrets.load_secrets(tmp_path, {})
    assert secrets.load_secrets(tmp_path, {}) == made
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600
    settings = load({variable: made[name] for name, variable, _ in secrets.GENERATED_SECRETS if variable})
    assert settings.need_flower_auth().startswith("headrace:")
    assert len(settings.encryption_keys[0]) == 32
    assert settings.junction_webhook_secrets
    assert settings.terra_signing_secrets


def test_configured_secrets_win_and_are_not_written(tmp_path: Path) -> None:
    key = base64.b64encode(b"k" * 32).decode()
    assert secrets.load_secrets(tmp_path, {"HEADRACE_ENCRYPTION_KEY": key})["encryption_key"] == key
    assert key not in (tmp_path / "secrets.json").read_text()


def test_a_database_without_secrets_json_is_an_error(tmp_path: Path) -> None:
    """A new password would not match the existing database."""
    (tmp_path / "postgres").mkdir()
    with pytest.raises(Misconfigured, match=r"secrets\.json is missing"):
        secrets.load_secrets(tmp_path, {})


def test_an_invalid_secrets_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "secrets.json").write_text("{")
    with pytest.raises(Misconfigured, match="not valid JSON"):
        secrets.load_secrets(tmp_path, {})


def test_two_stacks_do_not_share_a_folder(running: Path) -> None:
    with pytest.raises(Misconfigured, match=f"another `headrace up` .pid {os.getpid()}."), stack._locked(running):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change the user")
def test_a_folder_of_another_user_is_an_error(tmp_path: Path) -> None:
    """Breaks if `up` or `status` ends in a traceback, or root takes over the files of another user."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to other users
        Path(name).chmod(0o755)
        (Path(name) / "lock").touch(mode=0o600)
        (Path(name) / "stack.json").write_text(json.dumps(STACK))
        found = as_nobody(lambda: stack._make_data_dir(Path(name)), lambda: attach._is_locked(Path(name)))
        assert found == [
            f"HEADRACE_DATA_DIR: {name} cannot be used: Permission denied",
            f"{name}/lock belongs to another user; run this as the user of `headrace up`",
        ]
        for folder in ("log", "run"):
            (Path(name) / folder).mkdir()
        (text,) = as_nobody(lambda: stack._locked(Path(name)).__enter__())
        assert text.startswith(f"HEADRACE_DATA_DIR: {name} belongs to the stack of user root; run this as that user")
    os.chown(tmp_path, NOBODY, NOBODY)
    (tmp_path / "lock").touch()
    os.chown(tmp_path / "lock", NOBODY, NOBODY)
    with pytest.raises(Misconfigured, match="belongs to the stack of user nobody"), stack._locked(tmp_path):
        pass


def test_the_logs_of_a_stack_that_does_not_start_are_kept() -> None:
    """Breaks if a demo or drill that could not start deletes the logs that say why."""
    with pytest.raises(NotStarted) as error, running_stack("tests", {"DATABASE_URL": "mysql://h/d"}):
        pass
    text, _, folder = str(error.value).partition("; the logs are kept in ")
    assert text.startswith("the stack did not start: headrace: DATABASE_URL: not usable")
    assert "DATABASE_URL" in (Path(folder) / "up.log").read_text()
    shutil.rmtree(folder)


def test_metrics_are_in_memory_and_removed(tmp_path: Path) -> None:
    """Breaks if a full disk kills the endpoint (SIGBUS), or each start leaves a folder in memory."""
    first = stack._new_metrics_folder(tmp_path).resolve()
    second = stack._new_metrics_folder(tmp_path).resolve()
    assert (first.exists(), second.exists(), second.stat().st_mode & 0o777) == (False, True, 0o700)
    assert second.parent == (stack.MEMORY if os.access(stack.MEMORY, os.W_OK) else tmp_path)
    stack._remove_metrics_folder(tmp_path)
    assert not second.exists()
    assert not os.path.lexists(tmp_path / "metrics")


def test_servers_of_a_killed_stack_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new Valkey must not read a file that the old one still writes."""
    monkeypatch.setattr(stack, "LOCK_SECONDS", 0.5)
    with Supervisor(whole_process=False) as them:
        with stack._locked(tmp_path) as lock:
            program = stack.Program(
                "s", "s", ("/bin/sleep", "60"), {}, tmp_path / "log", lambda: True, pass_fds=(lock,)
            )
            them.start([program])
        with pytest.raises(Misconfigured, match="another"), stack._locked(tmp_path):
            pass
    with stack._locked(tmp_path):
        pass


def test_attach_completes_missing_settings(running: Path) -> None:
    found = attach.attach(Settings(), running)
    assert found.database_url == "postgresql+psycopg://headrace:p@127.0.0.1:3/headrace"
    assert found.broker_url == STACK["broker_url"]
    assert found.flower_auth == STACK["flower_auth"]
    assert found.junction_webhook_secrets == (STACK["junction_webhook_secret"],)
    kept = json.loads((running / "secrets.json").read_text())
    assert base64.b64encode(found.encryption_keys[0]).decode() == kept["encryption_key"]


def test_attach_keeps_given_settings(running: Path) -> None:
    given = Settings(database_url="postgresql+psycopg://elsewhere/db", flower_auth="me:password")
    found = attach.attach(given, running)
    assert (found.database_url, found.flower_auth) == (given.database_url, given.flower_auth)
    assert found.broker_url == STACK["broker_url"]
    assert attach.attach(Settings(redis_url="redis://elsewhere"), running).broker_url is None


def test_attach_needs_no_stack_with_complete_settings(tmp_path: Path) -> None:
    given = Settings(database_url="postgresql+psycopg://elsewhere/db", redis_url="redis://elsewhere")
    assert attach.attach(given, tmp_path / "none") is given


def test_the_error_without_a_stack_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=f"no stack runs in {tmp_path}; start one with `headrace up --data-dir"):
        attach.attach(Settings(), tmp_path)


def test_files_of_a_killed_stack_are_ignored(tmp_path: Path) -> None:
    """Its ports may belong to other programs by now."""
    (tmp_path / "stack.json").write_text(json.dumps(STACK))
    (tmp_path / "lock").write_text("1")
    with pytest.raises(Misconfigured, match="no stack runs"):
        attach.attach(Settings(), tmp_path)


def test_attach_does_not_block_a_starting_stack(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(str(os.getpid()))
    with (tmp_path / "lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_EX)
        with Supervisor(whole_process=False) as them:
            wait = "import time; time.sleep(0.5)"
            program = stack.Program(
                "s",
                "s",
                (sys.executable, "-c", wait),
                {},
                tmp_path / "log",
                lambda: True,
                pass_fds=(looking.fileno(),),
            )
            them.start([program])
            os.close(os.dup(looking.fileno()))
            looking.close()
            with stack._locked(tmp_path):
                pass


def test_the_data_directory_is_closed_except_for_postgres(tmp_path: Path) -> None:
    """As root, PostgreSQL's own user must be able to enter it."""
    stack._make_data_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == (0o755 if os.geteuid() == 0 else 0o700)
    assert (tmp_path / "a" / "b" / "log").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured, match="HEADRACE_DATA_DIR"):
        stack._make_data_dir(tmp_path / "file" / "b")


def test_every_withheld_variable_is_a_secret() -> None:
    """Breaks if a secret that is withheld from some processes is in the fork server, from which they are forked."""
    withheld = {name for names in secrets.WITHHELD.values() for name in names}
    assert withheld | {"BROKER_URL", "REDIS_URL", "HEADRACE_BROKER_MANAGEMENT_URL"} <= secrets.SECRET_VARIABLES


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:80"),  # noqa: S104 - only compared
        ("::", "http://[::1]:80"),
        ("fd00::7", "http://[fd00::7]:80"),
        ("ours.example", "http://ours.example:80"),
    ],
)
def test_the_url_of_an_address(host: str, url: str) -> None:
    """Breaks if stack.json names a URL that cannot be opened."""
    assert stack.url_of(host, 80) == url
