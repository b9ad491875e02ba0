"""What `headrace up` keeps in its folder, and how other commands find it. The whole stack is in tests/end_to_end."""

import base64
import fcntl
import json
import os
import sys
from pathlib import Path

import pytest

from app.config.settings import Settings, load
from app.errors import Misconfigured
from workers.local import attach, secrets, stack
from workers.local.supervisor import Supervisor

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


@pytest.fixture
def running(tmp_path: Path):
    """A folder as that of a running stack."""
    secrets.load_secrets(tmp_path, {})
    (tmp_path / "stack.json").write_text(json.dumps(STACK))
    with stack._locked(tmp_path):
        yield tmp_path


def test_secrets_are_made_once_and_are_usable(tmp_path: Path) -> None:
    """Else a restart would lock us out of our own database, and bodies on the queue could not be opened."""
    made = secrets.load_secrets(tmp_path, {})
    assert secrets.load_secrets(tmp_path, {}) == made
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600
    settings = load({variable: made[name] for name, variable, _ in secrets.GENERATED_SECRETS if variable})
    assert settings.need_flower_auth().startswith("headrace:")
    assert len(settings.encryption_keys[0]) == 32
    assert settings.junction_webhook_secrets
    assert settings.terra_signing_secrets


def test_the_operators_secrets_win_and_are_not_kept(tmp_path: Path) -> None:
    """Else a secret of the operator's would lie in a file that he does not know of."""
    key = base64.b64encode(b"k" * 32).decode()
    assert secrets.load_secrets(tmp_path, {"HEADRACE_ENCRYPTION_KEY": key})["encryption_key"] == key
    assert key not in (tmp_path / "secrets.json").read_text()


def test_data_without_its_password_is_told(tmp_path: Path) -> None:
    """Else a new password would be made, and PostgreSQL would refuse it for a minute without a word why."""
    (tmp_path / "postgres").mkdir()
    with pytest.raises(Misconfigured, match=r"secrets\.json is missing"):
        secrets.load_secrets(tmp_path, {})


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    """Else it would be a traceback, or new secrets over the old ones."""
    (tmp_path / "secrets.json").write_text("{")
    with pytest.raises(Misconfigured, match="damaged"):
        secrets.load_secrets(tmp_path, {})


def test_two_stacks_do_not_share_a_folder(running: Path) -> None:
    """Else two PostgreSQL or two Valkey would write the same files."""
    with pytest.raises(Misconfigured, match=f"another `headrace up` .pid {os.getpid()}."), stack._locked(running):
        pass


def test_servers_of_a_killed_stack_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the new Valkey would read a file that the old one, which is ending, still writes."""
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


def test_attach_fills_what_is_missing(running: Path) -> None:
    """Else `headrace status` in another terminal would need five variables set by hand."""
    found = attach.attach(Settings(), running)
    assert found.database_url == "postgresql+psycopg://headrace:p@127.0.0.1:3/headrace"
    assert found.broker_url == STACK["broker_url"]
    assert found.flower_auth == STACK["flower_auth"]
    assert found.junction_webhook_secrets == (STACK["junction_webhook_secret"],)
    kept = json.loads((running / "secrets.json").read_text())
    assert base64.b64encode(found.encryption_keys[0]).decode() == kept["encryption_key"]


def test_attach_leaves_what_is_set(running: Path) -> None:
    """Else a command would work on another database than the one it was told."""
    given = Settings(database_url="postgresql+psycopg://elsewhere/db", flower_auth="me:password")
    found = attach.attach(given, running)
    assert (found.database_url, found.flower_auth) == (given.database_url, given.flower_auth)
    assert found.broker_url == STACK["broker_url"]
    assert attach.attach(Settings(redis_url="redis://elsewhere"), running).broker_url is None


def test_attach_needs_no_stack_where_all_is_set(tmp_path: Path) -> None:
    """Else production would need a data folder."""
    given = Settings(database_url="postgresql+psycopg://elsewhere/db", redis_url="redis://elsewhere")
    assert attach.attach(given, tmp_path / "none") is given


def test_attach_tells_where_it_looked(tmp_path: Path) -> None:
    """Else the operator would not know that he stands in the wrong folder."""
    with pytest.raises(Misconfigured, match=f"no stack runs in {tmp_path}; start one with `headrace up --data-dir"):
        attach.attach(Settings(), tmp_path)


def test_what_a_killed_stack_left_is_no_stack(tmp_path: Path) -> None:
    """Else commands would go to ports that belong to somebody else by now."""
    (tmp_path / "stack.json").write_text(json.dumps(STACK))
    (tmp_path / "lock").write_text("1")
    with pytest.raises(Misconfigured, match="no stack runs"):
        attach.attach(Settings(), tmp_path)


def test_looking_does_not_keep_a_stack_from_starting(tmp_path: Path) -> None:
    """Else `headrace status --watch` could make `headrace up` fail."""
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


def test_the_folder_is_made_closed_but_passable_where_it_must_be(tmp_path: Path) -> None:
    """Else other users could look in; or, under root, PostgreSQL's user could not reach its data."""
    stack._make_data_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == (0o755 if os.geteuid() == 0 else 0o700)
    assert (tmp_path / "a" / "b" / "log").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured, match="HEADRACE_DATA_DIR"):
        stack._make_data_dir(tmp_path / "file" / "b")
