"""Turns this process into one of the Procfile's: the web server, a worker, beat or Flower. None of these returns."""

import os
from collections.abc import Mapping
from typing import NoReturn

from app.config.settings import Settings, process_environment
from app.observability.metrics import METRICS_FOLDER
from app.web.__main__ import make_folder
from workers.local.commands import own
from workers.local.niceness import lower_priority


def web(settings: Settings) -> NoReturn:
    """The endpoint on granian's event loop, one a process."""
    settings.need_webhook_secret()
    settings.need_broker()
    # Its processes count together through files; without a folder given they get one of their own.
    folder = {} if process_environment().get(METRICS_FOLDER) else {METRICS_FOLDER: make_folder()}
    _exec(own("app.web", "headrace", "web"), folder)  # it reads its settings itself; the words are for `ps`


def worker(settings: Settings, lane: str) -> NoReturn:
    """A worker of one lane. One process takes one message at a time: there is no pool, more processes are started."""
    settings.need_broker()
    settings.need_database()
    name = f"{lane}.{os.getpid()}@%h"
    # Solo does one at a time; the concurrency is what it fetches ahead, by default one message a core.
    options = ["--queues", lane, "--pool", "solo", "--concurrency", "1", "--hostname", name]
    options += ["--without-gossip", "--without-mingle"]
    lower_priority(lane)
    _exec(own("workers.celery", "worker", *options, "--loglevel", settings.log_level), {})


def beat(settings: Settings) -> NoReturn:
    """The clock. Its schedule is in memory: every job looks for what is due, so the next makes up a missed tick."""
    settings.need_broker()
    options = ["--scheduler", "celery.beat:Scheduler", "--loglevel", settings.log_level]
    _exec(own("workers.celery", "beat", *options), {})


def flower(settings: Settings) -> NoReturn:
    """Flower, never without a password, which goes by the environment because anybody can read a command line."""
    settings.need_broker()
    _exec(own("workers.celery.flower"), {"FLOWER_BASIC_AUTH": settings.need_flower_auth()})


def _exec(command: tuple[str, ...], more: Mapping[str, str]) -> NoReturn:
    os.execve(command[0], command, process_environment() | dict(more))  # noqa: S606 - a program of ours, no shell
