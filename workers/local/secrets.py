"""The secrets that `headrace up` generates once and keeps in secrets.json."""

import base64
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from app.config.settings import Settings
from app.errors import Misconfigured
from workers.local.files import read_json, write_secret

SECRETS = "secrets.json"
# Secrets that are generated once unless the operator has set them: name in secrets.json, variable, generator.
GENERATED_SECRETS: tuple[tuple[str, str | None, Callable[[], str]], ...] = (
    ("postgres_password", None, lambda: secrets.token_urlsafe(24)),
    ("postgres_writer_password", None, lambda: secrets.token_urlsafe(24)),
    ("broker_password", None, lambda: secrets.token_urlsafe(24)),
    ("flower_auth", "HEADRACE_FLOWER_AUTH", lambda: f"headrace:{secrets.token_urlsafe(24)}"),
    ("console_auth", None, lambda: f"headrace:{secrets.token_urlsafe(24)}"),
    ("junction_webhook_secret", "JUNCTION_WEBHOOK_SECRET", lambda: f"whsec_{_random_base64(24)}"),
    ("terra_signing_secret", "TERRA_SIGNING_SECRET", lambda: secrets.token_urlsafe(32)),
    ("encryption_key", "HEADRACE_ENCRYPTION_KEY", lambda: _random_base64(32)),
)

SIGNING = ("JUNCTION_WEBHOOK_SECRET", "TERRA_SIGNING_SECRET")
API_KEYS = ("JUNCTION_API_KEY", "TERRA_API_KEY", "TERRA_ADMIN_TOKEN")
FLOWER, CONSOLE = "HEADRACE_FLOWER_AUTH", "HEADRACE_CONSOLE_USERS"
DATABASE, WRITER = "DATABASE_URL", "HEADRACE_WRITER_PASSWORD"
PIPELINE, SEALING = "HEADRACE_ETL_URL", "HEADRACE_ENCRYPTION_KEY"
# By command, the variables with secrets that its process does not need. They are removed from its environment.
WITHHELD = {
    "web": (DATABASE, WRITER, *API_KEYS, FLOWER, CONSOLE, PIPELINE),
    "worker": (WRITER, *SIGNING, FLOWER, CONSOLE, PIPELINE),
    "etl": (WRITER, *SIGNING, FLOWER, CONSOLE),
    "beat": (DATABASE, WRITER, *API_KEYS, *SIGNING, FLOWER, CONSOLE, PIPELINE, SEALING),
    "flower": (DATABASE, WRITER, *API_KEYS, *SIGNING, CONSOLE, PIPELINE, SEALING),
    "console": (WRITER, *SIGNING, FLOWER, PIPELINE),
    "migrate": (*API_KEYS, *SIGNING, FLOWER, CONSOLE, PIPELINE, SEALING, "BROKER_URL", "REDIS_URL"),
}
# Further variables that the workers of a lane do not need: `derive` opens no body, `notify` only subscriptions'
# secrets.
WITHHELD_BY_LANE = {"notify": API_KEYS, "derive": (*API_KEYS, SEALING)}
# All variables with secrets: the fork server gets none of them.
SECRET_VARIABLES = frozenset(one.metadata["name"] for one in fields(Settings) if one.metadata["secret"])


def withheld(arguments: Sequence[str]) -> frozenset[str]:
    """The variables that `headrace ARGUMENTS` does not need. A worker's last argument is its lane."""
    return frozenset((*WITHHELD[arguments[0]], *WITHHELD_BY_LANE.get(arguments[-1], ())))


def _random_base64(size: int) -> str:
    return base64.b64encode(secrets.token_bytes(size)).decode()


def load_secrets(data_dir: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """By name: the operator's secrets, then those in secrets.json; missing ones are generated and written there."""
    kept = read_json(data_dir / SECRETS)
    if "postgres_password" not in kept and os.path.lexists(data_dir / "postgres"):
        raise Misconfigured(
            f"{data_dir / SECRETS} is missing, which held the password of the database in {data_dir / 'postgres'}; "
            "restore it, or choose another --data-dir"
        )
    given = {name: environment.get(variable or "", "").strip() for name, variable, _ in GENERATED_SECRETS}
    new = {name: make() for name, _, make in GENERATED_SECRETS if not given[name] and name not in kept}
    if new:
        write_secret(data_dir / SECRETS, json.dumps({**kept, **new}, indent=1))
    return {**kept, **new, **{name: value for name, value in given.items() if value}}
