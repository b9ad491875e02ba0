"""The contents of the wheel, built as in the image: from a copy of the sources, with the locked setuptools."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

PARTS = ("app", "workers", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
SOURCES = [
    file.relative_to(ROOT)
    for package in ("app", "workers")
    for file in sorted((ROOT / package).rglob("*"))
    if file.is_file() and "__pycache__" not in file.parts
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The file names in the wheel."""
    folder, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    command = (sys.executable, "-P", "-c", BUILD, str(built))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


def test_every_file_is_in_the_wheel(wheel: set[str]) -> None:
    """Breaks if the wheel lacks a package, a migration, the catalogue or py.typed."""
    assert {str(file) for file in SOURCES} - wheel == set()
    ours = {name for name in wheel if Path(name).parts[0] in {"app", "workers"}}
    assert ours == {str(file) for file in SOURCES}


@pytest.mark.parametrize(
    "name",
    [
        "app/py.typed",
        "workers/py.typed",
        "app/catalogue.toml",
        "workers/migrations/env.py",
        "workers/cli/__main__.py",
    ],
)
def test_files_without_an_import_are_in_the_wheel(wheel: set[str], name: str) -> None:
    """Breaks if a file that only type checkers, alembic or `python -m` use is moved or removed."""
    assert name in wheel


def test_every_migration_is_in_the_wheel(wheel: set[str]) -> None:
    """Breaks if the wheel lacks a migration, so that an installed Headrace creates an older schema."""
    versions = {file.name for file in (ROOT / "workers" / "migrations" / "versions").glob("*.py")}
    assert versions
    assert {Path(name).name for name in wheel if name.startswith("workers/migrations/versions/")} == versions


def test_every_package_is_in_the_wheel(wheel: set[str]) -> None:
    """Breaks if a new directory has no `__init__.py`, or the package discovery excludes it."""
    directories = {file.parent for file in SOURCES if file.suffix == ".py" and "migrations" not in file.parts}
    assert {f"{directory}/__init__.py" for directory in directories} - wheel == set()
