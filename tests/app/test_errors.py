"""Errors: the setting is a field, not only a part of the text."""

import ast
import copy
import re

import pytest

from app.config.settings import Settings, load
from app.errors import HeadraceError, Misconfigured, TryLater
from tests.support import ROOT

FILES = [file for package in ("app", "workers") for file in sorted((ROOT / package).rglob("*.py"))]
NAMED = re.compile(r"[A-Z][A-Z0-9_]{4,}: ")


@pytest.mark.parametrize("kind", [Misconfigured, TryLater])
def test_an_error_names_its_setting(kind: type[HeadraceError]) -> None:
    """Breaks if the text of an error lacks the setting, or code has to parse the text to find it."""
    error = kind("cannot be reached", setting="BROKER_URL")
    assert (str(error), error.setting) == ("BROKER_URL: cannot be reached", "BROKER_URL")
    assert (str(kind("elsewhere")), kind("elsewhere").setting) == ("elsewhere", "")
    again = copy.copy(error)
    assert (str(again), again.setting) == (str(error), error.setting)


def test_the_settings_own_errors_name_it() -> None:
    """Breaks if an error of the settings has no `setting`."""
    with pytest.raises(Misconfigured) as missing:
        Settings().need_broker()
    with pytest.raises(Misconfigured) as unusable:
        load({"HEADRACE_PORT": "many"})
    assert (missing.value.setting, unusable.value.setting) == ("BROKER_URL", "HEADRACE_PORT")


def texts(call: ast.Call) -> list[str]:
    """The constant beginning of a call's first argument."""
    first = call.args[0] if call.args else None
    parts = first.values[:1] if isinstance(first, ast.JoinedStr) else [first]
    return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def test_no_error_names_its_setting_in_its_text_alone() -> None:
    """Breaks if an error names its setting in its text only."""
    found = {
        f"{file.name}:{node.lineno}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"Misconfigured", "TryLater"}
        if any(NAMED.match(text) for text in texts(node))
    }
    assert found == set()
