"""The attacked stack, and the signals between the processes of a run."""

import json
import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Target:
    """The addresses and secrets of a stack, from its stack.json. It can be passed to another process."""

    stack: Path  # stack.json, which is rewritten when a process is restarted
    host: str
    port: int
    junction_secret: str
    terra_secret: str
    database_url: str
    broker_url: str

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Self:
        """The stack that `running_up` has started."""
        web = urlsplit(info["web"])
        secrets = info["junction_webhook_secret"], info["terra_signing_secret"]
        return cls(
            Path(info["file"]), web.hostname or "", web.port or 80, *secrets, info["database_url"], info["broker_url"]
        )

    def pids(self) -> dict[str, list[int]]:
        """The current main processes by group."""
        return dict(json.loads(self.stack.read_text(encoding="utf-8"))["processes"])


@dataclass(frozen=True)
class Signals:
    """`ready` is set once a process is prepared, `over` when it must end, `result` receives what it returns."""

    ready: Event
    over: Event
    result: Any

    @classmethod
    def new(cls) -> Self:
        """Unset signals."""
        return cls(CONTEXT.Event(), CONTEXT.Event(), CONTEXT.Queue())
