"""The secrets that `headrace up` generates once and keeps in secrets.json."""

import base64
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

from app.config.settings import Settings
from app.errors import Misconfigured
from workers.local.files import read_json, write_secret

# Generated once unless the operator has set them: the name in secrets.json, the variable, and the generator.
GENERATED_SECRETS: tuple[tuple[str, str | None, Callable[[], str]], ...] = (
    ("postgres_password", None, lambda: secrets.token_urlsafe(24)),
    ("postgres_writer_password", None, lambda: secrets.token_urlsafe(24)),
    ("broker_password", None, lambda: secrets.token_urlsafe(24)),
    ("flower_auth", "HEADRACE_FLOWER_AUTH", lambda: f"headrace:{secrets.token_urlsafe(24)}"),
    ("junction_webhook_secret", "JUNCTION_WEBHOOK_SECRET", lambda: f"whsec_{_random_base64(24)}"),
    ("terra_signing_secret", "TERRA_SIGNING_SECRET", lambda: secrets.token_urlsafe(32)),
    ("encryption_key", "HEADRACE_ENCRYPTION_KEY", lambda: _random_base64(32)),
)

SIGNING = ("JUNCTION_WEBHOOK_SECRET", "TERRA_SIGNING_SECRET")
API_KEYS = ("JUNCTION_API_KEY", "TERRA_API_KEY", "TERRA_ADMIN_TOKEN")
FLOWER, DATABASE, PIPELINE, SEALING = (
    "HEADRACE_FLOWER_AUTH",
    "DATABASE_URL",
    "HEADRACE_ETL_URL",
    "HEADRACE_ENCRYPTION_KEY",
)
# The variables with secrets that a process does not need, by its command. They are removed from its environment.
WITHHELD = {
    "web": (DATABASE, *API_KEYS, FLOWER, PIPELINE),
    "worker": (*SIGNING, FLOWER, PIPELINE),
    "etl": (*SIGNING, FLOWER),
    "beat": (DATABASE, *API_KEYS, *SIGNING, FLOWER, PIPELINE, SEALING),
    "flower": (DATABASE, *API_KEYS, *SIGNING, PIPELINE, SEALING),
    "migrate": (*API_KEYS, *SIGNING, FLOWER, PIPELINE, SEALING, "BROKER_URL", "REDIS_URL"),
}
# No process needs all of them; the fork server gets none.
SECRET_VARIABLES = frozenset(one.metadata["name"] for one in fields(Settings) if one.metadata["secret"])


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


SECRETS = "secrets.json"
