"""Svix's verifier, imported without the API client of its package."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from standardwebhooks.webhooks import Webhook

from app.signatures import junction
from tests.support import ROOT

# Of Svix's documentation ("Verifying Webhooks Manually").
SECRET = "whsec_plJ3nmyCDGBKInavdOK15jsl"
BODY = b'{"event_type":"ping","data":{"success":true}}'
NAME, AT = "msg_loFOjxBNrRLzqYUf", datetime.fromtimestamp(1731705121, UTC)
SIGNATURE = "v1,rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0="
LOOKS = "import app.signatures.junction, json, sys; print(json.dumps(sorted(sys.modules)))"
CLIENTS = {"svix", "httpx", "requests", "aiohttp", "pydantic"}


def headers(signature: str = SIGNATURE, at: datetime = AT) -> dict[str, str]:
    """The headers of a delivery, with Svix's names."""
    return {"svix-id": NAME, "svix-timestamp": str(int(at.timestamp())), "svix-signature": signature}


def test_the_file_is_where_it_was() -> None:
    """Breaks if Svix moves its verifier: the endpoint would not start. See `app.signatures.junction._svix_webhooks`."""
    package = importlib.util.find_spec("svix")
    assert package is not None
    assert package.submodule_search_locations is not None
    assert (Path(package.submodule_search_locations[0]) / "webhooks.py").is_file()
    assert Path(junction._svix.__file__ or "") == Path(package.submodule_search_locations[0]) / "webhooks.py"
    assert issubclass(junction._svix.WebhookVerificationError, Exception)
    assert {"Webhook", "WebhookVerificationError"} <= set(junction._svix.__all__)


def test_its_interface_is_the_one_that_is_called() -> None:
    """Breaks if the signature of `Webhook(secret).verify(body, headers)` changes."""
    assert list(inspect.signature(junction._svix.Webhook).parameters) == ["whsecret"]
    assert list(inspect.signature(junction._svix.Webhook.verify).parameters) == ["self", "data", "headers"]
    webhook, now = junction._svix.Webhook(SECRET), datetime.now(UTC)
    webhook.verify(BODY, headers(Webhook(SECRET).sign(NAME, now, BODY.decode()), now))


@pytest.mark.parametrize(
    "change", [{"svix-signature": SIGNATURE.replace("r", "s")}, {"svix-id": "msg_2"}, {"svix-id": ""}]
)
def test_it_refuses_with_the_error_that_is_caught(change: dict[str, str]) -> None:
    """Breaks if a forged delivery raises no error or another one."""
    now = datetime.now(UTC)
    given = headers(Webhook(SECRET).sign(NAME, now, BODY.decode()), now) | change
    with pytest.raises(junction._svix.WebhookVerificationError):
        junction._svix.Webhook(SECRET).verify(BODY, given)


def test_a_known_vector_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if both libraries change the signature scheme: this pair is from Svix's documentation."""

    class Then(datetime):
        @classmethod
        def now(cls, **_: object) -> datetime:
            return AT

    monkeypatch.setattr(sys.modules[Webhook.__module__], "datetime", Then)
    junction._svix.Webhook(SECRET).verify(BODY, headers())
    with pytest.raises(junction._svix.WebhookVerificationError):
        junction._svix.Webhook(SECRET).verify(BODY + b" ", headers())


def test_the_api_client_is_not_loaded() -> None:
    """Breaks if the endpoint imports the unused HTTP client: 49 MB and 0.7 s per process."""
    known = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LOOKS], env=known, capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in json.loads(done.stdout)} & CLIENTS == set()


@pytest.mark.parametrize("package", ["svix", "standardwebhooks"])
def test_both_libraries_are_declared(package: str) -> None:
    """Breaks if one of the packages is only an indirect dependency, or older than its lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (needed,) = [one for one in map(Requirement, project["dependencies"]) if one.name == package]
    lock = (ROOT / "deploy" / "requirements-runtime.lock").read_text(encoding="utf-8")
    (locked,) = [line.split("==")[1].split()[0] for line in lock.splitlines() if line.startswith(f"{package}==")]
    assert str(needed.specifier) == f">={locked}"
