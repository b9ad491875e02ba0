"""deploy/docs/runbook.md: its names, roles and sizes are correct. test_docs.py checks its commands and SQL."""

import re

import pytest

from app.broker.lanes import LANES
from tests.deploy.kustomize import RENDERED
from tests.deploy.support import DEPLOY, documents
from workers.store.engine import SESSION

RUNBOOK = (DEPLOY / "docs" / "runbook.md").read_text(encoding="utf-8")


def test_names_of_services_and_units_exist() -> None:
    """Breaks if a service, a Deployment or a unit was renamed and the runbook was not."""
    (compose,) = documents(DEPLOY / "compose.yaml")
    service_lists = re.findall(r"docker compose -f deploy/compose.yaml (?:up|run|exec) ([^#`\n]+)", RUNBOOK)
    services = {
        word for line in service_lists for word in line.partition("headrace")[0].split() if not word.startswith("-")
    }
    assert len(services) >= len(LANES)
    assert services <= compose["services"].keys()
    deployed = {one["metadata"]["name"] for one in RENDERED["example"] if one["kind"] in ("Deployment", "Job")}
    named = set(re.findall(r"(?:deploy/|job/| job )(headrace-\w+)", RUNBOOK))
    assert named
    assert named <= deployed
    units = {file.stem.partition("@")[0] for file in (DEPLOY / "systemd").glob("*.service")}
    restarted = " ".join(re.findall(r"systemctl (?:restart|enable --now) ([^`\n|]+)", RUNBOOK))
    assert set(re.findall(r"headrace-[a-z]+", restarted)) == units


def test_a_pooled_role_has_the_session_settings() -> None:
    """Breaks if a timeout or the time zone behind PgBouncer differs from that of a direct connection."""
    assert dict(re.findall(r"ALTER ROLE headrace SET (\w+) = '(\w+)'", RUNBOOK)) == SESSION


def test_sizes_are_computed_correctly() -> None:
    """Breaks if a measured figure was changed and a figure computed from it was not."""
    samples, events, records = 1440, 60, 10
    core_ms = samples * 18.5e-3 + events * 1.64
    stored = samples * 117 + events * 252 + records * 886
    archived = samples * 8.5 + events * 850
    assert f"= {core_ms:.0f} core-ms a day" in RUNBOOK
    assert f"= {stored / 1000:.0f} kB a day, {stored * 365 / 1e6:.0f} MB a year" in RUNBOOK
    assert f"= {archived / 1000:.0f} kB a day  = {archived * 30 / 1e6:.1f} MB with 30 days" in RUNBOOK
    one = r"([\d.,]+)"
    columns = r" \| ".join((one, rf"{one} \({one}\)", one, one, rf"{one} ([GT])B"))
    rows = re.findall(rf"^\| {columns} \|", RUNBOOK, re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        people, mean, peak, per_second, cores, disk = (float(value.replace(",", "")) for value in row[:6])
        computed = (
            (mean, people * events / 86_400),
            (peak, people * events / 86_400 * 5),
            (per_second, people * samples / 86_400),
            (cores, people * core_ms / 1000 / 86_400 * 5),
            (disk, people * stored * 365 / (1e9 if row[6] == "G" else 1e12)),
        )
        assert all(shown == pytest.approx(right, rel=0.1) for shown, right in computed), row
