"""The console as a process, and Debian's Chromium, which selenium drives without JavaScript in the pages."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.accounts import ROLES, Account, hash_password
from app.config.settings import Settings
from tests.browser.driver import chromium
from tests.browser.pages import Console
from tests.support import of_worker, program, until
from tests.support.console import PASSWORD
from tests.support.npm import node_modules
from workers.local.ports import free_port

AXE = Path(__file__).parent / "axe"


@pytest.fixture(scope="session")
def served(deployment: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a console with an account of each role."""
    port, hashed = free_port("127.0.0.1"), hash_password(PASSWORD)
    users = ",".join(Account(f"{role}-1", hashed, role).line for role in ROLES)
    more = {"HEADRACE_CONSOLE_PORT": str(port), "HEADRACE_CONSOLE_USERS": users}
    log, url = tmp_path_factory.mktemp("console") / "log", f"http://127.0.0.1:{port}"
    with program("workers.console", log=log, **of_worker(deployment), **more):
        until(lambda: _answers(url), 30)
        yield url
        assert "failed: " not in log.read_text(encoding="utf-8")


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/livez").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A browser without a profile."""
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def console(browser: object, served: str, settings: Settings) -> Console:
    """The console in the browser, with an empty database and without a login."""
    del settings  # which empties the database
    return Console(browser, served)


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, from the lock with hashes."""
    return (node_modules(AXE) / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
