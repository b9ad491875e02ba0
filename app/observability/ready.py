"""Readiness of workers and beat, and the port of their metrics."""

from pathlib import Path

from app.config.settings import Settings
from app.observability import metrics


def mark_ready(settings: Settings) -> None:
    """Starts the metrics port and creates the ready file, where they are configured."""
    if settings.metrics_port:
        metrics.serve(settings.operations_host, settings.metrics_port)
    if settings.ready_file:
        Path(settings.ready_file).touch()
