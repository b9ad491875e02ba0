"""The overview: healthy or not, what to do, and live rates."""

from datetime import UTC, datetime
from typing import Any

from flask import Blueprint, current_app, render_template

from app.errors import TryLater
from workers.console.context import console, record_look
from workers.console.ledger import Rates
from workers.operate import health
from workers.store.engine import transaction

pages = Blueprint("overview", __name__)
RATES = "console_rates"


@pages.get("/")
def page() -> str:
    now = console().snapshot.status()
    record_look("overview", [one.user_id for one in now.open_backfills] if now else ())
    return render_template(
        "overview.html",
        now=now,
        faults=list(health.problems(now)) if now else [],
        window_left=list(health.retry_window_left(now).items()) if now else [],
        rates=_rates(),
    )


def _rates() -> list[dict[str, Any]]:
    """The plots of the last half hour; none while PostgreSQL is away or counts for too long."""
    rates = current_app.extensions.setdefault(RATES, Rates())
    try:
        with transaction(console().reader) as connection:
            minutes = rates.read(connection, datetime.now(UTC))
    except TryLater:
        return []
    named = (("received", "Deliveries", "per minute"), ("dead", "Dead letters", "per minute"), ("delay", "Delay", "s"))
    return [_plot(title, unit, [float(one[name]) for one in minutes]) for name, title, unit in named]


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _plot(title: str, unit: str, heights: list[float]) -> dict[str, Any]:
    numbers = f"last minute {_short(heights[-1])} {unit}, maximum {_short(max(heights))} {unit}"
    label = f"{title} of the last {len(heights)} minutes: {numbers}"
    return {"title": title, "numbers": numbers, "heights": [max(one, 0) for one in heights], "label": label}
