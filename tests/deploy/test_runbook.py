"""deploy/docs/runbook.md: its names and roles are correct. test_docs.py checks its commands and SQL."""

import re

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
    assert dict(re.findall(r"ALTER ROLE headrace_writer SET (\w+) = '(\w+)'", RUNBOOK)) == SESSION
