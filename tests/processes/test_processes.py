"""How each process of the Procfile starts. Other tests cover its behaviour."""

from pathlib import Path

import psutil
import pytest

from tests.support import program, until
from workers.local.niceness import NICE
from workers.local.ports import free_port

pytestmark = pytest.mark.processes
PASSWORD = "sesame-open-the-door"


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("worker", "--lane", "backfill"), "-m workers.cli worker --lane backfill"),
        (("beat",), "-m workers.cli beat"),
        (("flower",), "-P -m workers.celery.flower"),
    ],
)
def test_a_command_is_one_process(broker_url: str, tmp_path: Path, arguments: tuple[str, ...], command: str) -> None:
    """Breaks if a parent or child process remains that misses signals, or if a command line contains a secret."""
    ready = tmp_path / "ready"
    environment = {
        "BROKER_URL": broker_url,
        "DATABASE_URL": f"postgresql://u:{PASSWORD}@127.0.0.1:1/d",
        "HEADRACE_FLOWER_AUTH": f"u:{PASSWORD}",
        "HEADRACE_FLOWER_PORT": str(free_port()),
        "HEADRACE_READY_FILE": str(ready),
    }
    with program("workers.cli", *arguments, **environment) as started:
        process = psutil.Process(started.pid)
        until(lambda: command in " ".join(process.cmdline()) and (ready.exists() or "flower" in command), 30)
        command_line = " ".join(process.cmdline())
        assert process.children() == []
        assert process.nice() == (NICE["backfill"] if "backfill" in arguments else 0)
        assert PASSWORD not in command_line
        assert broker_url not in command_line
