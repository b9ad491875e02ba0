"""`headrace migrate`: upgrades the schema."""

from __future__ import annotations

from pathlib import Path

import click

from workers.cli import output
from workers.cli.deployment import Deployment, deployment_option
from workers.local.files import free_bytes
from workers.store import conversion, migrate, roles

LOCAL_HOSTS = (None, "localhost", "127.0.0.1", "::1")
# Visible to superusers and members of pg_read_all_settings only.
DATA_DIRECTORY = "SELECT setting FROM pg_settings WHERE name = 'data_directory'"


@click.command("migrate")
@click.option("--convert", "is_converting", is_flag=True, help="replace yearly partitions of samples by monthly ones")
@deployment_option
def command(*, is_converting: bool, deployment: Deployment) -> None:
    """Upgrade the database to the newest schema. Safe to run twice, and concurrently.

    With HEADRACE_WRITER_PASSWORD, the login headrace_writer is then created, or its password and rights renewed.

    With --convert, the yearly partitions of earlier versions are then replaced by monthly ones while everything runs.
    This needs about as much free disk as the largest year. If interrupted, it continues when it is run again.
    """
    engine, settings = deployment.engine, deployment.settings
    click.echo(f"the schema is at version {migrate.migrate(engine)}")
    if settings.writer_password:
        migrate.create_writer(engine, settings.writer_password)
        click.echo(f"{roles.WRITER_LOGIN} has the rights of a writer")
    sources = conversion.unconverted(engine)
    if sources and not is_converting:
        names = ", ".join(one.name for one in sources)
        click.echo(f"not split into months yet: {names}; run `headrace migrate --convert` while everything runs")
        return
    for one in sources:
        _convert(deployment, one)


def _convert(deployment: Deployment, source: conversion.ConversionSource) -> None:
    click.echo(f"{source.name}: about {source.rows:,} rows; needs {_gigabytes(source.bytes)} of free disk for a while")
    free = _free(deployment)
    if free is not None and free < source.bytes:
        raise click.ClickException(
            f"only {_gigabytes(free)} are free on the disk of the database; add space and repeat"
        )
    copied = 0
    with output.progress(f"rows of {source.name} copied", source.rows) as update:

        def count(rows: int) -> None:
            nonlocal copied
            copied += rows
            update(copied)

        conversion.convert(deployment.engine, source, count)
    click.echo(f"{source.name}: {copied:,} rows are in monthly partitions")


def _free(deployment: Deployment) -> int | None:
    """The free space of the server's disk; None if the server runs on another machine, or hides its directory."""
    host = deployment.engine.url.host
    if host not in LOCAL_HOSTS and not str(host).startswith("/"):
        return None
    with deployment.transaction() as connection:
        directory = connection.exec_driver_sql(DATA_DIRECTORY).scalar()
    try:
        return free_bytes(Path(directory)) if directory else None
    except OSError:
        return None


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
