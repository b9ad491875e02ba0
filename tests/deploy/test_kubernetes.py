"""deploy/kubernetes, rendered and checked against the API types, the command line, the settings and the routes."""

import os
import re
import shutil
import subprocess
import typing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from ruamel.yaml import YAML

from app.broker.lanes import LANES
from app.config.settings import Settings, load
from app.web.app import create_app
from tests.deploy.api_types import faults
from tests.deploy.kustomize import BASE, ETL, FOLDER, HIGH_AVAILABILITY, OVERLAY, RENDERED, Resource
from tests.deploy.support import DEPLOY, SAMPLES, SETTINGS, documents, parse
from workers.local.secrets import WITHHELD_BY_LANE
from workers.store.roles import WRITER_LOGIN

SECRETS = {one["metadata"]["name"]: one for one in documents(BASE / "secrets.example.yaml")}
DATABASE_SECRETS = {name for name, one in SECRETS.items() if "DATABASE_URL" in one["stringData"]}
NOT_APPLIED = {BASE / "secrets.example.yaml"}
# No package has the types of these; tests that know their fields check their objects.
UNTYPED = ("keda.sh/", "rabbitmq.com/", "postgresql.cnpg.io/")
ALL = {f"{name}-{one['kind']}-{one['metadata']['name']}": one for name, found in RENDERED.items() for one in found}


def of(kind: str, found: list[Resource] = RENDERED["example"]) -> dict[str, Resource]:
    """The resources of a kind, by name."""
    return {one["metadata"]["name"]: one for one in found if one["kind"] == kind}


DEPLOYMENTS = of("Deployment") | {"headrace-etl": of("Deployment", RENDERED["etl"])["headrace-etl"]}
POLICIES = of("NetworkPolicy", RENDERED["etl"]) | of("NetworkPolicy")
PODS = {name: one["spec"]["template"] for name, one in (DEPLOYMENTS | of("Job")).items()}


def container(name: str) -> dict[str, Any]:
    """The only container of a pod."""
    (only,) = PODS[name]["spec"]["containers"]
    return dict(only)


def environment(name: str) -> dict[str, str]:
    """The environment of a pod, with sample values for the secrets."""
    variables: dict[str, str] = {}
    for source in container(name)["envFrom"]:
        if "configMapRef" in source:
            variables |= of("ConfigMap")[source["configMapRef"]["name"]]["data"]
        else:
            keys = SECRETS[source["secretRef"]["name"]]["stringData"]
            variables |= {key: SAMPLES.get(key, f"a {key} of 16 letters") for key in keys}
    return variables


def matches(labels: dict[str, str], selector: dict[str, Any]) -> bool:
    """Whether a selector matches these labels."""
    return selector.get("matchLabels", {}).items() <= labels.items()


@pytest.mark.parametrize("one", [*ALL.values(), *SECRETS.values()], ids=[*ALL, *SECRETS])
def test_every_object_is_valid(one: Resource) -> None:
    """Breaks if a field is misspelt, missing or has a wrong type."""
    if one["apiVersion"].startswith(UNTYPED):
        pytest.skip("no package has its types; the tests of scaling and of high availability check it")
    assert faults(one) == []


@pytest.mark.parametrize("name", RENDERED)
def test_kustomize_renders_the_same(name: str, tmp_path: Path) -> None:
    """Breaks if the tests render other objects than kubectl applies."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl")
    folder = {"base": BASE, "example": OVERLAY, "high-availability": HIGH_AVAILABILITY}.get(name, tmp_path)
    if name == "etl":
        base, component = (os.path.relpath(one, tmp_path) for one in (BASE, ETL))
        (tmp_path / "kustomization.yaml").write_text(f"resources: [{base}]\ncomponents: [{component}]\n")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr

    def by_name(found: list[Resource]) -> dict[tuple[str, str], Resource]:
        return {(one["kind"], one["metadata"]["name"]): one for one in found}

    assert by_name(list(YAML(typ="safe", pure=True).load_all(done.stdout))) == by_name(RENDERED[name])


def test_every_file_is_applied() -> None:
    """Breaks if a manifest is not listed in a kustomization."""
    named = set()
    for file in FOLDER.rglob("kustomization.yaml"):
        (kustomization,) = documents(file)
        paths = [
            *kustomization.get("resources", ()),
            *kustomization.get("components", ()),
            *(one["path"] for one in kustomization.get("patches", ())),
        ]
        named |= {(file.parent / path).resolve() for path in paths}
    files = {file for file in FOLDER.rglob("*.yaml") if file.name != "kustomization.yaml"}
    assert files - named == NOT_APPLIED
    folders = {file.parent for file in FOLDER.rglob("kustomization.yaml")}
    assert folders - named == {OVERLAY, HIGH_AVAILABILITY, ETL}


@pytest.mark.parametrize("name", PODS)
def test_every_command_is_valid(name: str) -> None:
    """Breaks if a pod would exit with a usage error."""
    arguments = [
        part.replace("$(LANE)", PODS[name]["metadata"]["labels"].get("lane", "")) for part in container(name)["args"]
    ]
    parse(arguments)


def test_every_lane_has_workers_and_beat_runs_once() -> None:
    """Breaks if a lane has no workers, or beat could run twice and schedule jobs twice."""
    workers = [labels for pod in PODS.values() if (labels := pod["metadata"]["labels"]).get("lane")]
    assert {one["lane"] for one in workers} == set(LANES)
    assert len(workers) == len(LANES)
    (field,) = (one for one in container("headrace-live")["env"] if one["name"] == "LANE")
    assert field["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['lane']"
    beat = of("Deployment")["headrace-beat"]["spec"]
    assert (beat["replicas"], beat["strategy"]["type"]) == (1, "Recreate")


@pytest.mark.parametrize("name", PODS)
def test_a_process_gets_what_it_needs_and_no_more(name: str) -> None:
    """Breaks if a process would reject its settings, or the endpoint could read the database."""
    variables = environment(name)
    assert variables.keys() <= SETTINGS
    settings = load(variables)
    assert settings.keep_days == Settings().keep_days  # set in the ConfigMap because the migration needs it
    labels = PODS[name]["metadata"]["labels"]
    role, not_of_lane = labels["app.kubernetes.io/component"], WITHHELD_BY_LANE.get(labels.get("lane", ""), ())
    if role == "etl":
        settings.need_etl()
    if role != "migrate":
        settings.need_broker()
    assert not variables.keys() & set(not_of_lane)
    reads_bodies = role not in ("migrate", "beat", "flower") and "HEADRACE_ENCRYPTION_KEY" not in not_of_lane
    assert bool(settings.encryption_keys) == reads_bodies
    is_operators = name == "headrace-maintenance"  # `headrace check` runs there and needs every setting
    assert bool(settings.flower_auth) == (role == "flower" or is_operators)
    assert bool(settings.junction_webhook_secrets) == (role == "web" or is_operators)
    assert bool(settings.console_users) == (role == "console" or is_operators)
    assert bool(settings.database_url) == (role in ("worker", "migrate", "etl", "console"))
    assert bool(settings.writer_password) == (role == "migrate")
    used = {source["secretRef"]["name"] for source in container(name)["envFrom"] if "secretRef" in source}
    assert ("headrace-owner" in used) == (role == "migrate")
    assert bool(settings.junction_api_key) == (role in ("worker", "etl", "console") and not not_of_lane)
    assert bool(settings.etl_url) == (role == "etl")


def test_only_the_migration_logs_in_as_the_owner() -> None:
    """Breaks if a compromised worker could change tables or the audit log."""
    users = {name: urlsplit(SECRETS[name]["stringData"]["DATABASE_URL"]).username for name in DATABASE_SECRETS}
    assert users == {"headrace-owner": "headrace", "headrace-database": WRITER_LOGIN}


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_hardened(name: str) -> None:
    """Breaks if a compromised pod runs as root, has a writable file system, or holds a token of the cluster."""
    pod, one = PODS[name]["spec"], container(name)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert one["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= one["resources"]["requests"].keys()
    assert "memory" in one["resources"]["limits"]
    (mount,) = one["volumeMounts"]
    assert [volume["name"] for volume in pod["volumes"] if "emptyDir" in volume] == [mount["name"]]
    user = re.findall(r"^USER (\d+):(\d+)$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)[-1]
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (int(user[0]), int(user[1]))


def test_selectors_match_their_pods_only() -> None:
    """Breaks if a Service, a budget or a policy selects no pod, or two Deployments select the same pod."""
    labels = {name: pod["metadata"]["labels"] for name, pod in PODS.items()}
    for name, one in DEPLOYMENTS.items():
        assert [other for other in labels if matches(labels[other], one["spec"]["selector"])] == [name]
    for kind in ("PodDisruptionBudget", "Service", "NetworkPolicy"):
        for name, one in (POLICIES if kind == "NetworkPolicy" else of(kind)).items():
            spec = one["spec"]
            selector = spec.get("podSelector", spec.get("selector"))
            selector = {"matchLabels": selector} if kind == "Service" else selector
            found = {other for other in labels if matches(labels[other], selector)}
            assert found, (kind, name)
            assert found == {name} or kind != "PodDisruptionBudget"


def test_the_network_policies_allow_only_needed_connections() -> None:
    """Breaks if the endpoint can connect to more than the broker, or a worker lacks a connection."""
    policies = POLICIES
    assert policies["nobody"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    egress_policies = {name: one["spec"]["podSelector"] for name, one in policies.items() if name.startswith("to-")}
    reached = {
        name: {policy for policy in egress_policies if matches(pod["metadata"]["labels"], egress_policies[policy])}
        for name, pod in PODS.items()
    }
    worker = {"to-broker", "to-database", "to-internet"}
    assert reached == {
        "headrace-web": {"to-broker"},
        "headrace-beat": {"to-broker"},
        "headrace-flower": {"to-broker"},
        "headrace-console": worker,
        "headrace-migrate": {"to-database"},
        "headrace-etl": {"to-broker", "to-database", "to-pipeline"},
        **{f"headrace-{lane}": worker for lane in LANES},
        "headrace-derive": worker - {"to-internet"},
    }
    (internet,) = policies["to-internet"]["spec"]["egress"]
    assert internet["ports"] == [{"port": 443}]
    assert all("169.254.0.0/16" in to["ipBlock"]["except"] or ":" in to["ipBlock"]["cidr"] for to in internet["to"])
    base = of("NetworkPolicy", RENDERED["base"])["to-database"]["spec"]["egress"]
    assert policies["to-database"]["spec"]["egress"] != base


def test_probes_use_existing_routes_ports_and_files() -> None:
    """Breaks if a pod would be killed or never ready because its probe uses a missing route, port or file."""
    settings = Settings(broker_url="memory://")
    ready_file = of("ConfigMap")["headrace"]["data"]["HEADRACE_READY_FILE"]
    ports = {
        "headrace-web": [("http", settings.port), ("operations", settings.operations_port)],
        "headrace-flower": [("flower", settings.flower_port)],
        "headrace-console": [("console", settings.console_port)],
    }
    for name in PODS:
        one = container(name)
        listening = [(port["name"], port["containerPort"]) for port in one.get("ports", ())]
        assert listening == ports.get(name, [])
        probes = {key: value for key, value in one.items() if key.endswith("Probe")}
        for probe in probes.values():
            if "exec" in probe:
                assert probe["exec"]["command"] == ["test", "-e", ready_file]
            else:
                assert probe["httpGet"]["port"] == ports[name][-1][0]
                assert probe["httpGet"]["path"] in (
                    {"/healthcheck"} if name == "headrace-flower" else {"/livez", "/readyz"}
                )
        assert probes or name == "headrace-migrate"
    web = container("headrace-web")
    assert web["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert (
        web["livenessProbe"]["httpGet"]["path"] == "/livez"
    )  # with /readyz, an outage of the broker would kill the pod


def test_the_ingress_exposes_webhooks_only() -> None:
    """Breaks if the path of an aggregator is not exposed, or the metrics are."""
    (rule,) = of("Ingress")["headrace"]["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    flask = create_app(Settings(broker_url="memory://"), typing.cast("Any", None), lambda: None)
    open_routes = {one.rule for one in flask.url_map.iter_rules() if one.rule.startswith(path["path"])}
    assert open_routes == {"/webhooks/junction", "/webhooks/terra"}
    service = of("Service")[path["backend"]["service"]["name"]]["spec"]
    assert path["backend"]["service"]["port"]["name"] in {port["name"] for port in service["ports"]}
    assert {port["targetPort"] for port in service["ports"]} <= {
        port["name"] for port in container("headrace-web")["ports"]
    }
    megabytes = of("Ingress")["headrace"]["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert megabytes == f"{Settings().max_body_bytes // 2**20}m"


def test_a_worker_has_time_to_finish_its_message() -> None:
    """Breaks if a stopping worker is killed within 60 s, before it finishes its message."""
    for lane in (*LANES, "etl"):
        assert PODS[f"headrace-{lane}"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_lanes_scale_by_their_own_depth_and_age() -> None:
    """Breaks if KEDA would scale a lane by the depth or age of another one, or reject the object."""
    scaled = of("ScaledObject")
    assert {one["spec"]["scaleTargetRef"]["name"] for one in scaled.values()} == {
        f"headrace-{lane}" for lane in LANES if lane not in ("maintenance", "notify")
    }
    known = {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod", "fallback"}
    for name, one in scaled.items():
        spec, lane = one["spec"], name.removeprefix("headrace-")
        assert spec.keys() <= known | {"triggers"}
        assert spec["scaleTargetRef"] == {"name": name}
        assert "replicas" not in of("Deployment")[name]["spec"]
        assert 1 <= spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"]
        depth, age = spec["triggers"]
        queries = (
            f'max(headrace_lane_messages{{lane="{lane}"}})',
            f'max(headrace_lane_oldest_seconds{{lane="{lane}"}}) or vector(0)',
        )
        if lane == "derive":  # its work is in PostgreSQL, and a message starts all of it
            queries = ("max(headrace_days_pending)", "max(headrace_days_oldest_seconds)")
        assert (depth["metadata"]["query"], age["metadata"]["query"]) == queries
        assert (depth.get("metricType"), age["metricType"]) == (None, "Value")
        for trigger in (depth, age):
            assert trigger["type"] == "prometheus"
            assert trigger["metadata"].keys() == {"serverAddress", "query", "threshold", "ignoreNullValues"}
            assert all(isinstance(value, str) for value in trigger["metadata"].values())  # KEDA accepts strings only
            assert float(trigger["metadata"]["threshold"]) > 0


def test_the_example_overlay_names_an_image_of_its_own() -> None:
    """Breaks if a copy of the example would pull an image without a registry or a version."""
    assert {container(name)["image"] for name in PODS if name != "headrace-etl"} == {"registry.example/headrace:0.2.0"}
