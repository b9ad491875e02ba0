"""Accounts of the console: hashes, roles, and the form of HEADRACE_CONSOLE_USERS."""

import pytest

from app.accounts import Account, hash_password, is_password, read_accounts
from app.config.settings import Settings, load
from app.errors import Misconfigured

HASH = hash_password("correct horse battery")


def test_a_hash_fits_its_password_only() -> None:
    """Breaks if any other password logs in, or if two equal passwords have equal hashes."""
    assert is_password("correct horse battery", HASH)
    assert not is_password("correct horse batterz", HASH)
    assert not is_password("", HASH)
    assert not is_password("x" * 2000, HASH)
    assert hash_password("correct horse battery") != HASH
    assert HASH.startswith("scrypt.15.8.1.")


@pytest.mark.parametrize(
    "broken", ["", "scrypt", HASH.replace("15", "30", 1), f"{HASH}x", HASH.replace("scrypt", "md5")], ids=range(5)
)
def test_no_password_fits_an_unusable_hash(broken: str) -> None:
    """Breaks if a hash of another form is accepted, or its cost is not limited."""
    assert not is_password("correct horse battery", broken)


def test_each_role_includes_those_before_it() -> None:
    viewer, operator, privacy = (Account("a", HASH, role) for role in ("viewer", "operator", "privacy"))
    assert [viewer.may(role) for role in ("viewer", "operator", "privacy")] == [True, False, False]
    assert [operator.may(role) for role in ("viewer", "operator", "privacy")] == [True, True, False]
    assert [privacy.may(role) for role in ("viewer", "operator", "privacy")] == [True, True, True]


def test_a_line_is_read_as_it_was_printed() -> None:
    first, second = Account("ada", HASH, "viewer"), Account("bob@example.com", HASH, "privacy")
    assert read_accounts(f" {first.line},\n{second.line} ,") == (first, second)


@pytest.mark.parametrize(
    "value",
    ["ada", f"ada:{HASH}", f"ada:{HASH}:root", "ada:secret:viewer", f":{HASH}:viewer", f"a b:{HASH}:viewer",
     f"ada:{HASH}:viewer,ada:{HASH}:privacy", f"ada:{HASH}:viewer:x"], ids=range(8),
)  # fmt: skip
def test_an_unusable_account_stops_the_process_without_quoting_it(value: str) -> None:
    """Breaks if a wrong line is ignored, so that an account has another role, or if the message quotes a hash."""
    with pytest.raises(Misconfigured) as caught:
        load({"HEADRACE_CONSOLE_USERS": value})
    assert str(caught.value).startswith("HEADRACE_CONSOLE_USERS: not usable")
    assert HASH not in str(caught.value)


def test_the_console_needs_an_account() -> None:
    with pytest.raises(Misconfigured, match="HEADRACE_CONSOLE_USERS"):
        Settings().need_console_users()
