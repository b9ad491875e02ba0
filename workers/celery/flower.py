"""Flower as Headrace runs it: every page behind the password, /metrics too, and a bounded history."""

from flower.views.monitor import Metrics
from tornado.web import authenticated

from app.config.settings import process_environment
from app.errors import Misconfigured
from workers.celery.app import celery, settings

OPTIONS = ["--persistent=False", "--max_tasks=5000", "--max_workers=500", "--purge_offline_workers=60"]


def main() -> None:
    """Runs Flower until it is told to end."""
    settings.need_flower_auth()
    if not process_environment().get("FLOWER_BASIC_AUTH"):
        raise Misconfigured("FLOWER_BASIC_AUTH: not set; start Flower with `headrace flower`, which sets it")
    celery.conf.broker_transport = None  # Flower asks by the transport's name how to look into a broker
    # Flower 2.2 shows its metrics, worker and task names included, to anybody; only /healthcheck may be open.
    Metrics.get = authenticated(Metrics.get)
    celery.start(
        argv=["flower", f"--address={settings.host}", f"--port={settings.flower_port}", *OPTIONS, "--logging=warning"]
    )


if __name__ == "__main__":
    main()
