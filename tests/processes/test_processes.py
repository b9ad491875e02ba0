"""The processes of the Procfile and how each is started. Other tests cover what they do."""

from pathlib import Path

import psutil
import pytest

from tests.support import program, until
from workers.local.niceness import NICE
from workers.local.ports import free_port

pytestmark = pytest.mark.processes
SESAME = "sesame-open-the-door"


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        (("worker", "--lane", "backfill"), "-m workers.cli worker --lane backfill"),
        (("beat",), "-m workers.cli beat"),
        (("flower",), "-P -m workers.celery.flower"),
    ],
)
def test_a_command_is_one_process(broker_url: str, tmp_path: Path, arguments: tuple[str, ...], runs: str) -> None:
    """Breaks if a parent or child process remains that misses signals, or a command line contains a secret."""
    ready = tmp_path / "ready"
    environment = {
        "BROKER_URL": broker_url,
        "DATABASE_URL": f"postgresql://u:{SESAME}@127.0.0.1:1/d",
        "HEADRACE_FLOWER_AUTH": f"u:{SESAME}",
        "HEADRACE_FLOWER_PORT": str(free_port()),
        "HEADRACE_READY_FILE": str(ready),
    }
    with program("workers.cli", *arguments, **environment) as started:
        process = psutil.Process(started.pid)
        until(lambda: runs in " ".join(process.cmdline()) and (ready.exists() or "flower" in runs), 30)
        line = " ".join(process.cmdline())
        assert process.children() == []
        assert process.nice() == (NICE["backfill"] if "backfill" in arguments else 0)
        assert SESAME not in line
        assert broker_url not in line
