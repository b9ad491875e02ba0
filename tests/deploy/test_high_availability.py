"""deploy/high-availability and the Kubernetes resources of its clusters, held against their page and, where they are
installed, read by the real programs.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.broker.lanes import LANES
from app.config.settings import Settings, load
from tests.deploy.kustomize import HIGH_AVAILABILITY, RENDERED
from tests.deploy.support import DEPLOY, SAMPLES, SETTINGS, documents, interpolate, parse
from tests.support.rabbitmq import ABSENT, RabbitMQ, binaries
from workers.local.ports import free_port
from workers.local.secrets import WITHHELD, WITHHELD_BY_LANE
from workers.store.roles import WRITER_LOGIN

FOLDER = DEPLOY / "high-availability"
PAGE = (DEPLOY / "docs" / "high-availability.md").read_text(encoding="utf-8")
EXAMPLE = (FOLDER / "env.example").read_text(encoding="utf-8")
COMPOSE_TEXT = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
(COMPOSE,) = documents(FOLDER / "compose.yaml")
(PATRONI,) = documents(FOLDER / "patroni.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: one for name, one in SERVICES.items() if one["image"].startswith("headrace:")}
NAMES = re.findall(r"^([A-Z_0-9]+)=", EXAMPLE, re.MULTILINE)
FILLED = {name: SAMPLES.get(name, f"{name.lower()}-1") for name in NAMES} | {
    "MACHINE": "m2",
    "OTHER_1": "m1",
    "OTHER_2": "m3",
    "LIMITS_MACHINE": "m3",
    "HEADRACE_FLOWER_AUTH": SAMPLES["HEADRACE_FLOWER_AUTH"],
    "TERRA_ADMIN_TOKEN": "",
}
BY_KIND = {one["kind"]: one for one in RENDERED["high-availability"] if one["kind"] in ("RabbitmqCluster", "Cluster")}
# Checked because the files are example values of one machine.
PROGRAM_ENVIRONMENT = {
    "PATRONI_NAME": "m1",
    "PATRONI_ETCD3_HOSTS": "127.0.0.2:2379",
    "PATRONI_RESTAPI_LISTEN": "127.0.0.2:8008",
    "PATRONI_RESTAPI_CONNECT_ADDRESS": "127.0.0.2:8008",
    "PATRONI_POSTGRESQL_LISTEN": "127.0.0.2:5432",
    "PATRONI_POSTGRESQL_CONNECT_ADDRESS": "127.0.0.2:5432",
    "PATRONI_SUPERUSER_USERNAME": "postgres",
    "PATRONI_SUPERUSER_PASSWORD": "x",
    "PATRONI_REPLICATION_USERNAME": "replicator",
    "PATRONI_REPLICATION_PASSWORD": "x",
}


def environment(name: str) -> dict[str, str]:
    """The environment of a Headrace service."""
    return {key: interpolate(value, FILLED) for key, value in OURS[name]["environment"].items()}


def configured(text: str) -> dict[str, str]:
    """The settings of a rabbitmq.conf."""
    return dict(re.findall(r"^([\w.]+) = (\S+)$", text, re.MULTILINE))


def test_the_file_follows_the_compose_schema() -> None:
    """Breaks if a key is misspelt or has a wrong type according to the schema of the Compose specification."""
    file = str(FOLDER / "compose.yaml")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_example_lists_every_variable() -> None:
    """Breaks if env.example lacks a variable of compose.yaml, or lists one without effect."""
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", COMPOSE_TEXT)) - {"ETCD_STATE"}  # only for a replaced machine
    assert set(NAMES) == used | {"COMPOSE_PROFILES"}


@pytest.mark.parametrize("name", OURS)
def test_a_process_gets_what_it_needs(name: str) -> None:
    """Breaks if a process would exit with a usage error or reject its settings, or a setting is misspelt."""
    parse(OURS[name]["command"])
    variables = environment(name)
    assert variables.keys() <= SETTINGS
    settings = load(variables)
    if name in ("console", *LANES):
        assert f"://{WRITER_LOGIN}:postgres_writer_password-1@/headrace?host=m1,m2,m3&" in settings.need_database()
    if name == "migrate":
        assert "://headrace:postgres_password-1@/headrace?host=m1,m2,m3&" in settings.need_database()
        assert settings.writer_password == "postgres_writer_password-1"
    if name != "migrate":
        hosts = re.findall(r"@(\w+):5672", settings.need_broker())
        assert hosts == ["m2", "m1", "m3"]  # the own machine first
        settings.need_redis()
    if name in ("web", "maintenance"):
        settings.need_webhook_secret()
        assert settings.operations_port == Settings().operations_port


def test_every_process_and_lane_runs_on_every_machine() -> None:
    """Breaks if the loss of one machine ends a lane or the schedule."""
    commands = {tuple(one["command"]) for one in OURS.values() if "profiles" not in one}
    assert commands == {("web",), ("beat",), ("flower",), *(("worker", "--lane", lane) for lane in LANES)}
    assert {name for name, one in SERVICES.items() if "profiles" in one} == {"valkey", "balancer", "migrate", "console"}


@pytest.mark.parametrize("lane", WITHHELD_BY_LANE)
def test_a_worker_gets_only_the_secrets_of_its_lane(lane: str) -> None:
    """Breaks if a worker that calls no aggregator gets the API keys."""
    assert not environment(lane).keys() & {*WITHHELD["worker"], *WITHHELD_BY_LANE[lane]}


def test_the_policy_of_the_page_names_every_lane() -> None:
    """Breaks if RabbitMQ 4 drops messages of a lane after 20 deliveries."""
    assert PAGE.count(f"'^({'|'.join(LANES)})(\\.delayed)?$'") == 2  # Compose and Kubernetes


@pytest.mark.parametrize("name", ["headrace-live", "headrace-notify"])
def test_several_workers_of_a_lane_are_on_different_nodes(name: str) -> None:
    """Breaks if the loss of a node ends a lane until Kubernetes has replaced its pods."""
    (one,) = (
        one for one in RENDERED["high-availability"] if one["metadata"]["name"] == name and one["kind"] == "Deployment"
    )
    (constraint,) = one["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert one["spec"]["replicas"] > 1
    assert (constraint["topologyKey"], constraint["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "DoNotSchedule")
    assert constraint["labelSelector"]["matchLabels"].items() <= one["spec"]["template"]["metadata"]["labels"].items()
    assert constraint["labelSelector"]["matchLabels"]["lane"] == name.removeprefix("headrace-")


def test_images_have_exact_tags() -> None:
    """Breaks if a restart could pull another version."""
    images = [one["image"] for one in SERVICES.values()] + [
        BY_KIND["RabbitmqCluster"]["spec"]["image"],
        BY_KIND["Cluster"]["spec"]["imageName"],
    ]
    for image in images:
        assert re.search(r":(\$\{HEADRACE_VERSION:-)?v?\d+\.\d+[\w.-]*\}?$", image), image


def test_compose_and_kubernetes_have_the_same_settings() -> None:
    """Breaks if a setting that the claim needs was changed in one of the two."""
    own = configured((FOLDER / "rabbitmq.conf").read_text(encoding="utf-8"))
    spec = BY_KIND["RabbitmqCluster"]["spec"]
    operators = configured(spec["rabbitmq"]["additionalConfig"])
    assert operators.items() <= own.items()
    assert {name: own[name] for name in ("net_ticktime", "cluster_partition_handling")} == {
        "net_ticktime": "12",
        "cluster_partition_handling": "pause_minority",
    }
    assert spec["replicas"] == BY_KIND["Cluster"]["spec"]["instances"] == 3
    dcs = PATRONI["bootstrap"]["dcs"]
    assert (dcs["synchronous_mode"], dcs["synchronous_mode_strict"], dcs["synchronous_node_count"]) == (True, True, 1)
    assert dcs["ttl"] >= dcs["loop_wait"] + 2 * dcs["retry_timeout"]  # Patroni's own rule
    parameters = {name: str(value) for name, value in dcs["postgresql"]["parameters"].items()}
    theirs = BY_KIND["Cluster"]["spec"]["postgresql"]
    assert theirs["parameters"].items() <= parameters.items()
    assert theirs["synchronous"] == {"method": "any", "number": 1, "dataDurability": "required", "failoverQuorum": True}


def test_the_resources_have_known_fields() -> None:
    """Breaks if a field is misspelt: the operators' webhooks refuse it, or ignore it."""
    known = {
        "RabbitmqCluster": {"replicas", "image", "persistence", "resources", "rabbitmq", "affinity", "override"},
        "Cluster": {
            *("instances", "imageName", "inheritedMetadata", "bootstrap", "postgresql", "storage", "walStorage"),
            *("affinity", "switchoverDelay", "resources"),
        },
    }
    assert {kind: one["spec"].keys() for kind, one in BY_KIND.items()} == known
    (rule,) = BY_KIND["RabbitmqCluster"]["spec"]["affinity"]["podAntiAffinity"].values()
    assert rule[0]["labelSelector"] == {"matchLabels": {"app.kubernetes.io/name": "headrace-rabbitmq"}}
    labels = BY_KIND["RabbitmqCluster"]["spec"]["override"]["statefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert labels == {"serves": "broker"}
    assert BY_KIND["Cluster"]["spec"]["inheritedMetadata"]["labels"] == {"serves": "database"}
    assert {one["metadata"]["namespace"] for one in BY_KIND.values()} == {"headrace-data"}
    policies = {one["metadata"]["name"]: one for one in RENDERED["high-availability"] if one["kind"] == "NetworkPolicy"}
    for name, value in (("to-broker", "broker"), ("to-database", "database")):
        (rule,) = policies[name]["spec"]["egress"]
        assert rule["to"] == [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"serves": value}}}]


def test_the_page_names_the_values_of_the_files() -> None:
    """Breaks if a setting of the page's tables has another value in the files."""
    own = configured((FOLDER / "rabbitmq.conf").read_text(encoding="utf-8"))
    dcs = PATRONI["bootstrap"]["dcs"]
    flat = {**own, **{name: value for name, value in dcs.items() if name != "postgresql"}}
    flat |= dcs["postgresql"] | dcs["postgresql"]["parameters"]
    section = PAGE.partition("## What each setting is for")[2].partition("\n## ")[0]
    stated = re.findall(r"^\| `([\w.]+) ?[=:] ?([^`]+)` \|", section, re.MULTILINE)
    assert len(stated) >= 10
    for name, value in stated:
        assert str(flat[name]).lower() == value.lower(), name


def test_haproxy_reads_its_file(tmp_path: Path) -> None:
    """Breaks if HAProxy would refuse the file."""
    haproxy = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if haproxy is None:
        pytest.skip("HAProxy is not installed (Debian: apt-get install haproxy)")
    text = (FOLDER / "haproxy.cfg").read_text(encoding="utf-8")
    certificate = "bind :443 ssl crt /etc/haproxy/certs/"
    assert certificate in text
    own = tmp_path / "haproxy.cfg"  # without the certificate and with addresses, which the machine's names need
    own.write_text(re.sub(r"(server m\d) m\d:", r"\1 127.0.0.2:", text.replace(certificate, "bind 127.0.0.2:8443")))
    done = subprocess.run([haproxy, "-c", "-f", str(own)], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_patroni_reads_its_file(tmp_path: Path) -> None:
    """Breaks if Patroni would refuse a setting, or does not know its type."""
    patroni, postgres = shutil.which("patroni"), sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if patroni is None or not postgres:
        pytest.skip("Patroni or PostgreSQL is not installed (Debian: apt-get install patroni postgresql)")
    own, data = tmp_path / "patroni.yml", tmp_path / "data"
    data.mkdir()
    text = (FOLDER / "patroni.yml").read_text(encoding="utf-8")
    text = text.replace(PATRONI["postgresql"]["data_dir"], str(data))
    own.write_text(text.replace(PATRONI["postgresql"]["bin_dir"], str(postgres[-1])))
    done = subprocess.run(
        [patroni, "--validate-config", str(own)],
        env={"PATH": os.environ["PATH"], **PROGRAM_ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    # No etcd runs here, pg_hba is set for the server instead of for its creation, and the superuser rewinds.
    expected = ("etcd3.hosts", "bootstrap.pg_hba  is not defined", "postgresql.authentication.rewind  is not defined")
    left = [line for line in (done.stdout + done.stderr).splitlines() if line and not line.startswith(expected)]
    assert left == []


def test_rabbitmq_applies_its_file(tmp_path: Path) -> None:
    """Breaks if RabbitMQ would refuse a setting, or ignores the two that a failover depends on."""
    if binaries() is None:
        pytest.skip(ABSENT)
    server = RabbitMQ(tmp_path)
    text = (FOLDER / "rabbitmq.conf").read_text(encoding="utf-8")
    without_cluster = re.sub(r"^cluster_formation\..*\n", "", text, flags=re.MULTILINE)
    (tmp_path / "rabbitmq.conf").write_text(without_cluster.replace(" 15672", f" {free_port()}"))
    (tmp_path / "plugins").write_text("[rabbitmq_management].\n")
    with server:
        assert server.control("eval", "net_kernel:get_net_ticktime().").strip() == "12"
        handling = server.control("eval", "application:get_env(rabbit, cluster_partition_handling).").strip()
        assert handling == "{ok,pause_minority}"


def test_the_overlay_is_a_folder_of_its_own() -> None:
    """Breaks if the page names another folder than the tests render."""
    assert str(HIGH_AVAILABILITY.relative_to(DEPLOY.parent)) in PAGE
