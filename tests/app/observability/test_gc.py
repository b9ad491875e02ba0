"""The garbage collector skips the objects of start-up, and only those."""

import json
import os
import subprocess
import sys

import pytest

LOADED = {
    "the endpoint": "from app.web.app import from_environment; kept = from_environment()",
    "a worker": """
from celery import signals
from app.config.settings import load
from workers.celery import app
app._connect_signals(load())
signals.worker_ready.send(None)
""",
}
LOOKS = """
import gc, json, weakref
class Circle: pass
one = Circle(); one.self = one
gone = weakref.ref(one); del one
gc.collect()
print(json.dumps([gc.get_freeze_count(), gone() is None, gc.isenabled()]))
"""


@pytest.mark.parametrize("program", LOADED.values(), ids=LOADED)
def test_loaded_objects_are_not_scanned_again(program: str) -> None:
    """Breaks if collections traverse the libraries, or later objects are never freed."""
    own = {"BROKER_URL": "redis://127.0.0.1:1/0", "TERRA_SIGNING_SECRET": "0123456789abcdef"}
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    command = [sys.executable, "-c", program + LOOKS]
    done = subprocess.run(command, env=kept | own, stdout=subprocess.PIPE, check=True, timeout=60)
    frozen, is_freed, is_on = json.loads(done.stdout)
    assert frozen > 20_000
    assert is_freed
    assert is_on
