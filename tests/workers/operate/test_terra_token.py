"""The token of Terra's Admin API in `headrace status` and in the metrics."""

import io
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from sqlalchemy import Engine

from app.config.settings import Settings
from app.observability import metrics
from tests.support.cases import each
from workers.aggregators.admin_token import Token, TokenFault
from workers.operate import status_view
from workers.operate.gauges import GaugeCollector
from workers.operate.health import Status, problems
from workers.store import jobs

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def token(days: float | None, **more: Any) -> Token:
    """A token that expires so many days after NOW, checked an hour ago."""
    expires_at = None if days is None else NOW + days * DAY
    return Token(**{"checked_at": NOW - DAY / 24, "expires_at": expires_at, "approved_at": NOW} | more)


def problem(given: Token | None) -> str:
    """The problem of a status with this token."""
    return "".join(f"{one.what} -> {one.do}" for one in problems(Status(terra_token=given, at=NOW)))


@each(
    (None, ""),
    (token(None), ""),
    (token(14.1), ""),
    (token(13.5), "the token of Terra's Admin API expires in 13 d 12 h: rotate it -> set TERRA_ADMIN_TOKEN"),
    (
        token(3, approved_at=NOW - 89 * DAY),
        "the token of Terra's Admin API expires in 3 d: a person has to approve a new one -> set TERRA_ADMIN_TOKEN",
    ),
    (
        token(-1),
        "the token of Terra's Admin API has expired: a person has to approve a new one -> set TERRA_ADMIN_TOKEN",
    ),
    (token(30, fault="status 401", do="set TERRA_ADMIN_TOKEN"), "status 401 -> set TERRA_ADMIN_TOKEN"),
    # A token that no reconciliation has used for two weeks is no longer set.
    (token(-20, checked_at=NOW - 15 * DAY), ""),
    (token(30, fault="status 401", do="set TERRA_ADMIN_TOKEN", checked_at=NOW - 15 * DAY), ""),
)
def test_a_token_that_expires_is_a_problem(given: Token | None, text: str) -> None:
    """Breaks if nobody learns in time that a person has to act, or a token that was removed is a problem for ever."""
    assert problem(given) == text


def test_the_token_is_shown(engine: Engine) -> None:
    """Breaks if the time at which the token expires, or its fault, is not in the status or not JSON."""
    assert status_view.read(engine, [], []).plain()["terra_admin_token"] is None
    jobs.note(engine, jobs.TERRA_TOKEN, token(30))
    jobs.note(engine, jobs.TERRA_TOKEN, TokenFault("the scope is missing", "set it", checked_at=datetime.now(UTC)))
    status = status_view.read(engine, [], [])
    plain = json.loads(json.dumps(status.plain()))
    assert (plain["terra_admin_token"]["expires_at"], plain["faults"]) == (
        "2026-12-26T12:00:00Z",
        [{"what": "the scope is missing", "do": "set it"}],
    )
    printed = io.StringIO()
    Console(file=printed, width=100).print(status_view.render(status))
    assert "2026-12-26" in printed.getvalue()


def test_the_gauge_has_the_time(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if the alert on a token that expires never fires, or fires where there is none, or none any more."""
    name, now = "headrace_terra_admin_token_expires_timestamp_seconds", datetime.now(UTC)
    expires = (NOW + 30 * DAY).timestamp()
    for noted, value in ((None, 0), (token(30, checked_at=now), expires), (token(30, checked_at=now - 15 * DAY), 0)):
        if noted:
            jobs.note(engine, jobs.TERRA_TOKEN, noted)
        GaugeCollector(engine, replace(settings, broker_url=broker_url)).poll([])
        (line,) = [one for one in metrics.exposition().decode().splitlines() if one.startswith(name)]
        assert float(line.split()[1]) == value
