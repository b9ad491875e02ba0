"""Valkey from its wheel, as a program for the supervisor."""

from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.errors import Misconfigured
from workers.local.files import write_secret
from workers.local.ports import saved_port
from workers.local.supervisor import Program
from workers.local.wheels import ENVIRONMENT, valkey_binary

VALKEY_CONFIGURATION = """\
bind 127.0.0.1
port {port}
protected-mode yes
requirepass "{password}"
dir "{folder}"
daemonize no
logfile ""
save ""
appendonly yes
appendfsync always
aof-load-truncated yes
maxmemory-policy noeviction
enable-debug-command no
hide-user-data-from-log yes
crash-log-enabled no
"""


def valkey(folder: Path, password: str, log: Path, port: int | None = None) -> tuple[Program, str]:
    """Valkey and its URL; its data is in `folder`. Raises Misconfigured."""
    binary = valkey_binary()
    if binary is None:
        raise Misconfigured("not set, and no embedded Valkey exists for this platform; set it", setting="BROKER_URL")
    folder = folder.absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    port = saved_port(folder / "port") if port is None else port
    configuration = folder / "valkey.conf"
    text = VALKEY_CONFIGURATION.format(port=port, password=_quoted(password), folder=_quoted(str(folder)))
    write_secret(configuration, text)
    program = Program(
        group="broker",
        name="broker",
        command=(str(binary), str(configuration)),
        environment=ENVIRONMENT,
        log=log,
        ready=lambda: _valkey_answers(port, password),
        cwd=folder,
    )
    return program, f"redis://:{password}@127.0.0.1:{port}/0"


def _valkey_answers(port: int, password: str) -> bool:
    no_retry = Retry(NoBackoff(), 0)
    client = redis.Redis(
        port=port, password=password, socket_connect_timeout=1, socket_timeout=1, retry=no_retry, protocol=2
    )
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
