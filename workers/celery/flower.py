"""Flower as Headrace runs it: every page behind the password, /metrics too, and a bounded history."""

import os

from flower.views.monitor import Metrics
from tornado.web import authenticated

from app.config.settings import load, process_environment
from app.errors import Misconfigured
from workers.celery.app import make_app

settings = load()
celery = make_app(settings)
# Flower comes with Celery's command line, which without a name would load what a variable APP names.
APP = f"{__name__}:celery"
OPTIONS = ["--persistent=False", "--max_tasks=5000", "--max_workers=500", "--purge_offline_workers=60"]


def main() -> None:
    """Runs Flower until SIGTERM."""
    settings.need_flower_auth()
    if not process_environment().get("FLOWER_BASIC_AUTH"):
        raise Misconfigured("not set; start Flower with `headrace flower`, which sets it", setting="FLOWER_BASIC_AUTH")
    celery.conf.broker_transport = None  # Flower asks by the transport's name how to look into a broker
    # Flower 2.2 shows its metrics, worker and task names included, to anybody; only /healthcheck may be open.
    Metrics.get = authenticated(Metrics.get)
    where = [f"--address={settings.host}", f"--port={settings.flower_port}"]
    # Unless it is told where, Flower runs a `flowerconfig.py` of the current directory.
    where.append(f"--conf={process_environment().get('FLOWER_CONF', os.devnull)}")
    celery.start(["--app", APP, "flower", *where, *OPTIONS, "--logging=warning"])


if __name__ == "__main__":
    main()
