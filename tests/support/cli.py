"""Runs commands in the test's process, or each command in a forked process."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from click.testing import CliRunner, Result

from tests.support import ENVIRONMENT
from workers.cli.main import main

Headrace = Callable[..., Result]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
# Imports every command once, with what commands import lazily. Each line of standard input is a command, which runs in
# a fork of this process.
SERVER = """
import gc, json, os, sys
from workers.cli.main import COMMANDS, main
for name in COMMANDS:
    main.get_command(None, name)
for module in list(sys.modules.values()):
    dir(module)
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


def invoke(*words: object, answer: str | None = None, **environment: str) -> Result:
    """Runs a command in this process. Any exception but SystemExit fails the test."""
    done = CliRunner().invoke(main, [str(word) for word in words], input=answer, env=environment)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def error_line(done: Result, code: int = 1) -> str:
    """The error line. Asserts the exit status, and that the command printed nothing else."""
    assert (done.exit_code, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    return line


@contextmanager
def processes(folder: Path) -> Iterator[Run]:
    """Forks a preloaded process for each command, which saves the seconds of importing the libraries."""
    out, err = folder / "stdout", folder / "stderr"
    command, pipe = (sys.executable, "-c", SERVER), subprocess.PIPE
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True) as server:
        if server.stdin is None or server.stdout is None:
            raise TypeError

        def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
            given = {"arguments": arguments, "environment": ENVIRONMENT | environment, "folder": str(Path.cwd())}
            server.stdin.write(json.dumps(given | {"stdout": str(out), "stderr": str(err)}) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            return subprocess.CompletedProcess(arguments, status, out.read_text("utf-8"), err.read_text("utf-8"))

        yield run
        server.stdin.close()
