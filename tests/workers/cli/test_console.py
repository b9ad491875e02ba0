"""`headrace console`: its accounts, and the settings without which it does not start."""

import pytest

from app.accounts import is_password, read_accounts
from tests.support.cli import error_line, invoke


@pytest.mark.parametrize("role", ["viewer", "operator", "privacy"])
def test_passwd_prints_an_account(role: str) -> None:
    """Breaks if the line is not usable in HEADRACE_CONSOLE_USERS, or has the password."""
    done = invoke("console", "passwd", "ada", "--role", role, answer="correct horse battery\n")
    assert (done.exit_code, done.stderr) == (0, "")
    (account,) = read_accounts(done.stdout)
    assert (account.name, account.role) == ("ada", role)
    assert is_password("correct horse battery", account.hash)
    assert "correct" not in done.stdout


def test_passwd_refuses_a_short_password_and_a_wrong_name() -> None:
    line = error_line(invoke("console", "passwd", "ada", "--role", "viewer", answer="too short\n"))
    assert line == "Error: the password must have 12 or more characters"
    assert invoke("console", "passwd", "a:b", "--role", "viewer", answer="long enough 123\n").exit_code == 2
    assert invoke("console", "passwd", "ada", "--role", "root", answer="long enough 123\n").exit_code == 2


@pytest.mark.usefixtures("elsewhere")
def test_the_console_names_a_missing_setting() -> None:
    """Breaks if the console starts without an account, or the error does not name the setting."""
    database, broker = "postgresql://u@127.0.0.1:1/d", "redis://127.0.0.1:1/0"
    assert "DATABASE_URL: not set" in error_line(invoke("console"))
    assert "BROKER_URL: not set" in error_line(invoke("console", DATABASE_URL=database))
    line = error_line(invoke("console", DATABASE_URL=database, BROKER_URL=broker))
    assert "HEADRACE_CONSOLE_USERS: not set; set it to accounts as `headrace console passwd` prints them" in line
