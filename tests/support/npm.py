"""Packages of npm, from a lock with hashes beside the test that needs them."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


def node_modules(package: Path) -> Path:
    """The installed packages of a folder with package.json and package-lock.json. Installed once into .venv."""
    if not (npm := shutil.which("npm")):
        pytest.skip(f"no npm, which installs the packages of {package.name}")
    lock = (package / "package-lock.json").read_bytes()
    folder = Path(sys.prefix) / f"{package.name}-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not folder.exists():
        with TemporaryDirectory(dir=sys.prefix) as made:
            shutil.copytree(package, copy := Path(made, package.name))
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            if subprocess.run(command, cwd=copy, check=False, capture_output=True, env=dict(os.environ)).returncode:
                pytest.skip(f"npm cannot install the packages of {package.name}")
            copy.rename(folder)
    return folder / "node_modules"
