"""The page of one delivery: what it contains, in a bounded number of statements, and how its body is kept."""

from dataclasses import replace

import msgspec
from flask import Flask
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Receipt, seal
from app.sealing import Sealer
from tests.support import apply, delivery, heartrate, terra, workout
from tests.support.console import Browser, statements


def activities(count: int) -> list[dict[str, object]]:
    """Terra's activities, each with an id and a start of its own."""
    about = [{"summary_id": f"s{n}", "start_time": f"2026-03-{1 + n % 28:02}T06:{n % 60:02}:00Z"} for n in range(count)]
    return [terra.item() | {"metadata": terra.METADATA | one} for one in about]


def test_a_large_delivery_is_shown_with_few_statements(
    app: Flask, viewer: Browser, engine: Engine, settings: Settings
) -> None:
    """Breaks if a page asks PostgreSQL for each of thousands of records, or hides that it shows only some."""
    for name, count in (("trace-few", 5), ("trace-many", 300)):
        apply(engine, settings, delivery(terra.event("activity", *activities(count)), aggregator="terra", name=name))
    with statements(app) as few:
        page = viewer.get("/delivery?aggregator=terra&id=trace-few").text
    assert "These are the first" not in page
    with statements(app) as many:
        page = viewer.get("/delivery?aggregator=terra&id=trace-many").text
    assert page.count(">explain ") == 200
    assert "These are the first 200 of " in page
    assert "not stored" not in page
    assert len(many) <= len(few) + 2


def test_records_and_samples_are_compared_with_the_stored_ones(
    viewer: Browser, engine: Engine, settings: Settings
) -> None:
    apply(engine, settings, delivery(heartrate("u1", {0: 61, 1: 62}), name="msg_samples"))
    assert ">stored<" in viewer.get("/delivery?aggregator=junction&id=msg_samples").text
    apply(engine, replace(settings, resources=("sleep",)), delivery(workout("u1", "w9"), name="msg_ignored"))
    assert ">not stored<" in viewer.get("/delivery?aggregator=junction&id=msg_ignored").text


def test_a_body_is_called_encrypted_only_if_it_is(viewer: Browser, engine: Engine, settings: Settings) -> None:
    """Breaks if the console claims an encryption that HEADRACE_ENCRYPTION_KEY would have to provide."""
    bare = seal("junction", Receipt("msg_bare"), msgspec.json.encode(workout("u1")), Sealer([]))
    apply(engine, replace(settings, encryption_keys=()), bare)
    apply(engine, settings, delivery(workout("u1"), name="msg_sealed"))
    assert "kept without encryption in the archive" in viewer.get("/delivery?aggregator=junction&id=msg_bare").text
    assert "kept, encrypted, in the archive" in viewer.get("/delivery?aggregator=junction&id=msg_sealed").text
