"""Shared helpers of the deployment tests: strict YAML, and a parser for `headrace` command lines."""

import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from app.config.settings import Settings
from tests.support import ROOT
from workers.cli.main import main

DEPLOY = ROOT / "deploy"
SETTINGS = {one.metadata["name"] for one in fields(Settings)}

# Valid values of the settings that a deployment needs to start.
SAMPLES = {
    "HEADRACE_ENCRYPTION_KEY": "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUI=",
    "HEADRACE_FLOWER_AUTH": "operator:not-a-real-one",
    "HEADRACE_CONSOLE_USERS": f"ada:scrypt.15.8.1.{'A' * 22}.{'B' * 43}:operator",
    "HEADRACE_CONSOLE_URL": "https://console.example",
    "JUNCTION_WEBHOOK_SECRET": "whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQ=",
    "DATABASE_URL": "postgresql://headrace:p@postgres.example/headrace",
    "HEADRACE_ETL_URL": "amqps://u:p@rabbitmq.example/vhost",
    "HEADRACE_ETL_QUEUE": "junction",
    "BROKER_URL": "rediss://:p@broker.example:6379/0",
    "REDIS_URL": "rediss://:p@broker.example:6379/0",
}


def documents(file: Path) -> list[Any]:
    """The documents of a YAML file. A duplicate key is an error, which other parsers ignore."""
    return [document for document in YAML(typ="safe", pure=True).load_all(file) if document is not None]


def parse(arguments: Iterable[str]) -> list[str]:
    """Parses `headrace ARGUMENTS` without running it and returns the names of the commands. Raises click's errors."""
    command: click.Command = main
    parent, rest, names = None, list(arguments), list[str]()
    while True:
        try:
            context = command.make_context(names[-1] if names else "headrace", rest, parent=parent)
        except click.exceptions.Exit:  # --help and --version
            return names
        words = [*context._protected_args, *context.args]
        if not isinstance(command, click.Group) or (command.invoke_without_command and not words):
            return names
        name, found, rest = command.resolve_command(context, words)
        if found is None:
            raise click.UsageError(f"no command {name}")
        command, parent, names = found, context, [*names, str(name)]


def interpolate(text: str, values: dict[str, str]) -> str:
    """Interpolates variables as Compose does: ${A}, ${A:-default} and ${A:?message}, also nested; $$ is a dollar."""
    inner = re.compile(r"(?<!\$)\$\{(\w+)(?:(:[-?])([^{}]*))?\}")

    def value(found: re.Match[str]) -> str:
        name, kind, other = found.groups()
        if not values.get(name) and kind == ":?":
            raise KeyError(name)
        return values.get(name) or (other if kind == ":-" else "")

    while (text_after := inner.sub(value, text)) != text:
        text = text_after
    return text.replace("$$", "$")
