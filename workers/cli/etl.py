"""`headrace etl`: consumes the RabbitMQ queue of Junction's ETL pipeline."""

import click

from app.broker.celery import make_celery
from app.config.settings import load
from app.observability import logs
from workers.backfill.fetcher import FollowUp
from workers.celery.context import WorkerContext
from workers.ingest import rabbitmq_pipeline
from workers.ingest.apply import Applier
from workers.ingest.outcomes import Applied
from workers.store.engine import WORKER_SESSION, make_writer


@click.command("etl")
@click.option("--optional", is_flag=True, help="wait instead of failing if HEADRACE_ETL_URL is not set")
def command(*, optional: bool) -> None:
    """Consume the queue of Junction's ETL pipeline. One process per queue works; further ones stand by."""
    settings = load()
    if optional and not settings.etl_url:
        rabbitmq_pipeline.idle()
        return
    settings.need_etl()
    settings.need_database()
    logs.configure(settings)
    name = "headrace-etl"
    if settings.broker_url or settings.redis_url:
        work = WorkerContext(make_celery(settings, "publisher"), settings, name)

        def hand_over(applied: Applied) -> None:
            work.hand_over(applied)
            work.enqueue(FollowUp(one, 0) for one in applied.backfills)

        rabbitmq_pipeline.run(settings, work.applier, hand_over)
    else:  # without a broker, the sweep starts announced backfills
        rabbitmq_pipeline.run(settings, Applier(make_writer(settings, name, WORKER_SESSION), settings))
