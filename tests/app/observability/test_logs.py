"""The log: text or JSON, one id from the endpoint to the row, without contents."""

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings, load
from app.delivery import Delivery
from app.observability import logs
from app.web.app import create_app
from app.web.batcher import Batcher
from app.web.publishing import in_thread
from tests.support import apply, delivery, rows, signed, workout


@pytest.fixture
def restored() -> Iterator[None]:
    """Restores the configuration of logging."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logs.bind()


def said(settings: Settings, form: str, level: str = "INFO") -> io.StringIO:
    """The output of the log from now on."""
    logs.configure(replace(settings, log_format=form, log_level=level))
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.stream = out = io.StringIO()
    return out


@pytest.mark.usefixtures("restored")
def test_a_line_is_an_object(plain_settings: Settings) -> None:
    """Breaks if a JSON line lacks a field or an id."""
    out = said(plain_settings, "json")
    logs.bind(task="headrace.apply", task_id="t-1")
    logging.getLogger("workers.ingest.apply").warning("dead: %s", "not JSON", extra={"delivery": "msg_1"})
    logs.bind()
    logging.getLogger("workers.celery.tasks").warning("later")
    first, second = map(json.loads, out.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    wanted = {"level": "WARNING", "logger": "workers.ingest.apply", "message": "dead: not JSON"}
    assert first == wanted | {"delivery": "msg_1", "task": "headrace.apply", "task_id": "t-1"}
    assert "task_id" not in second


@pytest.mark.usefixtures("restored")
def test_a_line_for_people_ends_with_its_ids(plain_settings: Settings) -> None:
    """Breaks if a text line lacks the ids."""
    out = said(plain_settings, "text")
    logs.bind(task_id="t-1")
    logging.getLogger("workers.ingest.apply").warning("dead", extra={"delivery": "msg_1"})
    assert out.getvalue().endswith("WARNING workers.ingest.apply dead delivery=msg_1 task_id=t-1\n")


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("form", ["text", "json"])
def test_one_id_from_the_receipt_to_the_row(engine: Engine, settings: Settings, form: str) -> None:
    """Breaks if the log lines of an event lack its id, or contain its values, its user or a secret."""
    out, taken = said(settings, form, "DEBUG"), list[Delivery]()
    batcher = Batcher(settings, in_thread(taken.extend))
    client = create_app(settings, batcher, lambda: None).test_client()
    body = msgspec.json.encode(workout("u-secret", average_hr=141))
    assert client.post("/webhooks/junction", data=body, headers=signed(body, name="msg_41")).status_code == 202
    apply(engine, settings, *taken)
    lines = [line for line in out.getvalue().splitlines() if "msg_41" in line]
    assert ["answered 202" in lines[0], "applied" in lines[1]] == [True, True]
    assert rows(engine, "SELECT outcome FROM health.deliveries WHERE message_id = 'msg_41'") == [{"outcome": "applied"}]
    assert not any(secret in out.getvalue() for secret in ("u-secret", "8000.5", "141", "whsec_", "svix-signature"))


@pytest.mark.usefixtures("restored")
def test_a_quarantined_message_is_logged(engine: Engine, settings: Settings) -> None:
    """Breaks if a dead letter is not logged at the default level, or every delivery is."""
    out = said(settings, "text")
    apply(engine, settings, delivery(workout("u1"), name="msg_good"), delivery(b"half", name="msg_bad"))
    (line,) = out.getvalue().splitlines()
    assert "WARNING" in line
    assert "delivery=msg_bad" in line
    assert "half" not in line


@pytest.mark.parametrize(("given", "found"), [("json", "json"), ("JSON", "json"), ("", "text")])
def test_the_form_is_a_setting(given: str, found: str) -> None:
    """Breaks if a valid log format is rejected."""
    environment: dict[str, Any] = {"HEADRACE_LOG_FORMAT": given}
    assert load(environment).log_format == found
