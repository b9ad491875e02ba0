"""How a process that takes work says that it does, and shows what it has counted."""

from pathlib import Path

from app.config.settings import Settings
from app.observability import metrics


def mark_ready(settings: Settings) -> None:
    """Tells the supervisor, and whoever asks at the port of its metrics."""
    if settings.metrics_port:
        metrics.serve(settings.host, settings.metrics_port)
    if settings.ready_file:
        Path(settings.ready_file).touch()
