"""The limits of a web process."""

import resource
from dataclasses import replace

import pytest

from app.config.settings import Settings
from app.errors import Misconfigured
from app.web import limits
from app.web.limits import (
    CONNECTION_BYTES,
    DEFAULT_CONNECTIONS,
    RESERVED_FILES,
    BodyBudget,
    BudgetExceeded,
    connections_per_process,
)

FILES = {"several": 2_000, "many": 1_048_576, "no limit": resource.RLIM_INFINITY}


def hard_limit(monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """Sets the hard limit of open files that the process reads."""
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (1024, files))


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_connections_are_divided_by_the_processes(monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """Breaks if the default exceeds the limit of open files, where accepting fails, or a setting is not divided."""
    hard_limit(monkeypatch, files)
    expected = 2_000 - RESERVED_FILES if files == 2_000 else DEFAULT_CONNECTIONS // 2
    assert connections_per_process(Settings(web_processes=2)) == expected
    assert connections_per_process(Settings(web_processes=3, max_connections=1000)) == 334


def test_more_connections_than_open_files_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the endpoint promises connections for which it cannot open files."""
    hard_limit(monkeypatch, 5_000)
    with pytest.raises(Misconfigured, match="HEADRACE_MAX_CONNECTIONS: 6000 connections per process need") as wrong:
        connections_per_process(Settings(web_processes=2, max_connections=12_000))
    assert "LimitNOFILE" in str(wrong.value)


def test_the_soft_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the soft limit, usually 1,024, stays below the number of connections, or a higher one is lowered."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(limits.resource, "setrlimit", lambda _, both: found.append(both))
    hard_limit(monkeypatch, 5_000)
    limits.raise_file_limit(100)
    limits.raise_file_limit(2_000)
    limits.raise_file_limit(6_000)
    assert found == [(2_000 + RESERVED_FILES, 5_000), (5_000, 5_000)]


def test_the_budget_is_that_of_the_machine() -> None:
    """Breaks if each process has the whole budget, or has no room for one body of maximum size."""
    settings = Settings(web_processes=4, body_memory_bytes=4000, max_body_bytes=500)
    assert BodyBudget(settings).limit == 1000
    assert BodyBudget(replace(settings, max_body_bytes=1500)).limit == 1500


def test_a_share_is_returned() -> None:
    """Breaks if a request that fails keeps its share of the budget, so that it is used up in the end."""
    budget = BodyBudget(Settings(web_processes=1, body_memory_bytes=100, max_body_bytes=100))
    with budget.hold() as first:
        first(60)
        with budget.hold() as second:
            second(40)
            with pytest.raises(BudgetExceeded):
                second(1)
        assert budget.used == 60
    assert budget.used == 0


def test_the_default_limits_fit_in_the_memory_of_the_files_to_deploy() -> None:
    """Breaks if senders without a secret can make the system kill the endpoint."""
    processes = 90 * 2**20  # of the endpoint without load
    assert DEFAULT_CONNECTIONS * CONNECTION_BYTES + Settings().body_memory_bytes + processes < 2**30
