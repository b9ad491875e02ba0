"""Flower with a password on every page, /metrics included, and a bounded history."""

import os

from flower.views.monitor import Metrics
from tornado.web import authenticated

from app.config.settings import load, process_environment
from app.errors import Misconfigured
from workers.celery.app import make_app

settings = load()
celery = make_app(settings)
# Named, because without --app Celery's command line would load the module in the variable APP.
APP = f"{__name__}:celery"
OPTIONS = ["--persistent=False", "--max_tasks=5000", "--max_workers=500", "--purge_offline_workers=60"]


def main() -> None:
    """Runs Flower until SIGTERM."""
    settings.need_flower_auth()
    if not process_environment().get("FLOWER_BASIC_AUTH"):
        raise Misconfigured("not set; start Flower with `headrace flower`, which sets it", setting="FLOWER_BASIC_AUTH")
    celery.conf.broker_transport = None  # Flower selects its broker API by the transport, and does not know ours
    # Flower 2.2 serves /metrics, with the names of workers and tasks, without authentication.
    Metrics.get = authenticated(Metrics.get)
    where = [f"--address={settings.host}", f"--port={settings.flower_port}"]
    # Without --conf, Flower would execute a `flowerconfig.py` in the current directory.
    where.append(f"--conf={process_environment().get('FLOWER_CONF', os.devnull)}")
    celery.start(["--app", APP, "flower", *where, *OPTIONS, "--logging=warning"])


if __name__ == "__main__":
    main()
