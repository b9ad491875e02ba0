"""Processes started in a directory whose modules are named like Headrace's packages and its libraries."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import httpx
import msgspec
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import JUNCTION_SECRET, ROOT, of_worker, rows, signed, until, workout
from workers.local.ports import free_port
from workers.local.temporary import running_stack

SHADOWED_MODULES = {"app", "workers", "celery", "granian", "flowerconfig", "celeryconfig"}
MARK = "with open({marker!r}, 'a') as file:\n    file.write(__name__ + ' ')\n"
USER = "11111111-2222-4333-8444-555555555555"


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which the hostile modules of the current directory write when they are imported."""
    folder, marker = tmp_path / "hostile", tmp_path / "imported"
    for name in SHADOWED_MODULES | set(packages_distributions()) | sys.stdlib_module_names:
        package = folder / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(MARK.format(marker=str(marker)))
    for name in ("flowerconfig", "celeryconfig"):
        (folder / f"{name}.py").write_text(MARK.format(marker=str(marker)))
    monkeypatch.chdir(folder)
    return marker


def environment(settings: Settings) -> dict[str, str]:
    """The environment of a stack that uses the servers of this test run."""
    ports = {f"HEADRACE_{name}PORT": str(free_port()) for name in ("", "FLOWER_")}
    # Celery's command line takes APP for the application to load.
    return {
        "APP": "celeryconfig",
        "PYTHONPATH": str(ROOT),
        "JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET,
        **of_worker(settings),
        **ports,
    }


def test_no_process_runs_a_module_of_the_current_directory(
    settings: Settings, engine: Engine, broker_url: str, imported: Path
) -> None:
    """Breaks if a user who can write to the current directory of Headrace can run code in one of its processes."""
    with running_stack("hostile", environment(settings), workers=1) as stack:
        info = stack.info()
        assert {group for group, pids in info["processes"].items() if pids} >= {"web", "live", "beat", "flower"}
        body = msgspec.json.encode(workout(USER))
        url = f"{info['web']}/webhooks/junction"
        assert httpx.post(url, content=body, headers=signed(body), timeout=60).status_code == 202
        until(lambda: rows(engine, "SELECT 1 FROM health.workouts"), 120)
        assert httpx.get(f"{info['flower']}/workers", auth=tuple(info["flower_auth"].split(":")), timeout=60).is_success
    assert not imported.exists(), imported.read_text()


def constants(file: Path) -> set[object]:
    """The constants of a module."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def test_every_child_starts_without_the_current_directory() -> None:
    """Breaks if a module other than `app.commands` builds a Python command, which may then lack -P."""
    files = [file for package in ("app", "workers") for file in (ROOT / package).rglob("*.py")]
    assert {file.name for file in files if "-m" in constants(file)} == {"commands.py"}


@pytest.mark.parametrize("script", ["demo", "bench", "setup"])
def test_scripts_start_python_without_the_current_directory(script: str) -> None:
    """Breaks if a script runs a module of the directory that it is started in."""
    lines = (ROOT / "deploy" / script).read_text(encoding="utf-8").splitlines()
    started = [line for line in lines if 'python" ' in line and " -m " in line]
    assert started
    assert [line for line in started if " -P -m " not in line] == []
