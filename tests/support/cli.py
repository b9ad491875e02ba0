"""Commands of a test: in its own process, or each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from click.testing import Result

from tests.support import ROOT

Headrace = Callable[..., Result]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
# Loads every command once. Each line on standard input is a command, which runs in a copy of this process.
SERVER = """
import gc, json, os, sys
from workers.cli.main import COMMANDS, main
for name in COMMANDS:
    main.get_command(None, name)
gc.freeze()
for line in sys.stdin:
    given = json.loads(line)
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, given["stdout"]), (2, given["stderr"])):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(given["folder"])
        os.environ.clear()
        os.environ.update(given["environment"])
        sys.argv = ["headrace", *given["arguments"]]
        main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def processes(folder: Path) -> Iterator[Run]:
    """Runs commands as processes of their own, without the seconds that each needs to load its libraries."""
    known = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    out, err = folder / "stdout", folder / "stderr"
    command, pipe = (sys.executable, "-c", SERVER), subprocess.PIPE
    with subprocess.Popen(command, env=known, stdin=pipe, stdout=pipe, text=True) as server:
        if server.stdin is None or server.stdout is None:
            raise TypeError

        def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
            given = {"arguments": arguments, "environment": known | environment, "folder": str(Path.cwd())}
            server.stdin.write(json.dumps(given | {"stdout": str(out), "stderr": str(err)}) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            return subprocess.CompletedProcess(arguments, status, out.read_text("utf-8"), err.read_text("utf-8"))

        yield run
        server.stdin.close()
