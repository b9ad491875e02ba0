"""deploy/kubernetes, rendered and held against the API's own types, the command line, the settings and the routes."""

import os
import re
import shutil
import subprocess
import typing
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from app.broker.lanes import LANES
from app.config.settings import Settings, load
from app.web.app import create_app
from tests.deploy.api_types import faults
from tests.deploy.kustomize import BASE, ETL, FOLDER, OVERLAY, RENDERED, Resource
from tests.deploy.support import DEPLOY, SAMPLES, SETTINGS, documents, parse

SECRETS = {one["metadata"]["name"]: one for one in documents(BASE / "secrets.example.yaml")}
NOT_APPLIED = {BASE / "secrets.example.yaml"}
ALL = {f"{name}-{one['kind']}-{one['metadata']['name']}": one for name, found in RENDERED.items() for one in found}


def of(kind: str, found: list[Resource] = RENDERED["example"]) -> dict[str, Resource]:
    """The resources of a kind, by name."""
    return {one["metadata"]["name"]: one for one in found if one["kind"] == kind}


DEPLOYMENTS = of("Deployment") | {"headrace-etl": of("Deployment", RENDERED["etl"])["headrace-etl"]}
POLICIES = of("NetworkPolicy", RENDERED["etl"]) | of("NetworkPolicy")
PODS = {name: one["spec"]["template"] for name, one in (DEPLOYMENTS | of("Job")).items()}


def container(name: str) -> dict[str, Any]:
    """The one container of a pod."""
    (only,) = PODS[name]["spec"]["containers"]
    return dict(only)


def environment(name: str) -> dict[str, str]:
    """What a pod is told, with samples for the secrets."""
    told: dict[str, str] = {}
    for source in container(name)["envFrom"]:
        if "configMapRef" in source:
            told |= of("ConfigMap")[source["configMapRef"]["name"]]["data"]
        else:
            keys = SECRETS[source["secretRef"]["name"]]["stringData"]
            told |= {key: SAMPLES.get(key, f"a {key} of 16 letters") for key in keys}
    return told


def matches(labels: dict[str, str], selector: dict[str, Any]) -> bool:
    """Whether these labels are selected."""
    return selector.get("matchLabels", {}).items() <= labels.items()


@pytest.mark.parametrize("one", [*ALL.values(), *SECRETS.values()], ids=[*ALL, *SECRETS])
def test_it_is_what_the_api_takes(one: Resource) -> None:
    """Breaks if a field is misspelt, of another type or missing."""
    if one["apiVersion"] == "keda.sh/v1alpha1":
        pytest.skip("KEDA's types are in no package; see the test of scaling")
    assert faults(one) == []


@pytest.mark.parametrize("name", RENDERED)
def test_kustomize_makes_the_same_of_it(name: str, tmp_path: Path) -> None:
    """Breaks if these tests look at something else than what is applied."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl")
    folder = {"base": BASE, "example": OVERLAY}.get(name, tmp_path)
    if name == "etl":
        base, component = (os.path.relpath(one, tmp_path) for one in (BASE, ETL))
        (tmp_path / "kustomization.yaml").write_text(f"resources: [{base}]\ncomponents: [{component}]\n")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr

    def by_name(found: list[Resource]) -> dict[tuple[str, str], Resource]:
        return {(one["kind"], one["metadata"]["name"]): one for one in found}

    assert by_name(list(YAML(typ="safe", pure=True).load_all(done.stdout))) == by_name(RENDERED[name])


def test_every_file_is_applied() -> None:
    """Breaks if a manifest is written and forgotten."""
    named = set()
    for file in FOLDER.rglob("kustomization.yaml"):
        (told,) = documents(file)
        paths = [
            *told.get("resources", ()),
            *told.get("components", ()),
            *(one["path"] for one in told.get("patches", ())),
        ]
        named |= {(file.parent / path).resolve() for path in paths}
    files = {file for file in FOLDER.rglob("*.yaml") if file.name != "kustomization.yaml"}
    assert files - named == NOT_APPLIED
    folders = {file.parent for file in FOLDER.rglob("kustomization.yaml")}
    assert folders - named == {OVERLAY, ETL}


@pytest.mark.parametrize("name", PODS)
def test_its_command_is_one_of_headrace(name: str) -> None:
    """Breaks if a pod would end at once with a usage error."""
    arguments = [
        part.replace("$(LANE)", PODS[name]["metadata"]["labels"].get("lane", "")) for part in container(name)["args"]
    ]
    parse(arguments)


def test_every_lane_is_worked_on_and_there_is_one_clock() -> None:
    """Breaks if a lane has no workers, or the same work would be scheduled twice."""
    workers = [labels for pod in PODS.values() if (labels := pod["metadata"]["labels"]).get("lane")]
    assert {one["lane"] for one in workers} == set(LANES)
    assert len(workers) == len(LANES)
    (field,) = (one for one in container("headrace-live")["env"] if one["name"] == "LANE")
    assert field["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['lane']"
    beat = of("Deployment")["headrace-beat"]["spec"]
    assert (beat["replicas"], beat["strategy"]["type"]) == (1, "Recreate")


@pytest.mark.parametrize("name", PODS)
def test_a_process_gets_what_it_needs_and_no_more(name: str) -> None:
    """Breaks if a process would refuse its settings, or if the endpoint could read the database."""
    told = environment(name)
    assert told.keys() <= SETTINGS
    settings = load(told)
    assert settings.keep_days == Settings().keep_days  # stands in the ConfigMap for the migration's sake
    role = PODS[name]["metadata"]["labels"]["app.kubernetes.io/component"]
    if role == "etl":
        settings.need_etl()
    if role != "migrate":
        settings.need_broker()
        assert settings.encryption_keys
    is_operators = name == "headrace-maintenance"  # where `headrace check` must find everything
    assert bool(settings.flower_auth) == (role == "flower" or is_operators)
    assert bool(settings.junction_webhook_secrets) == (role == "web" or is_operators)
    assert bool(settings.database_url) == (role in ("worker", "migrate", "etl"))
    assert bool(settings.junction_api_key) == (role in ("worker", "etl"))
    assert bool(settings.etl_url) == (role == "etl")


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_hardened(name: str) -> None:
    """Breaks if whoever gets into a pod finds root, something to write on, or a token of the cluster's."""
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


def test_selectors_find_their_pods_and_only_those() -> None:
    """Breaks if a Service, a budget or a policy selects nobody, or if two Deployments fight over a pod."""
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


def test_the_network_is_closed_but_for_what_is_needed() -> None:
    """Breaks if the endpoint reaches more than the broker, or a worker too little."""
    policies = POLICIES
    assert policies["nobody"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ways = {name: one["spec"]["podSelector"] for name, one in policies.items() if name.startswith("to-")}
    reached = {
        name: {way for way in ways if matches(pod["metadata"]["labels"], ways[way])} for name, pod in PODS.items()
    }
    worker = {"to-broker", "to-database", "to-internet"}
    assert reached == {
        "headrace-web": {"to-broker"},
        "headrace-beat": {"to-broker"},
        "headrace-flower": {"to-broker"},
        "headrace-migrate": {"to-database"},
        "headrace-etl": {"to-broker", "to-database", "to-pipeline"},
        **{f"headrace-{lane}": worker for lane in LANES},
    }
    (internet,) = policies["to-internet"]["spec"]["egress"]
    assert internet["ports"] == [{"port": 443}]
    assert all("169.254.0.0/16" in to["ipBlock"]["except"] or ":" in to["ipBlock"]["cidr"] for to in internet["to"])
    base = of("NetworkPolicy", RENDERED["base"])["to-database"]["spec"]["egress"]
    assert policies["to-database"]["spec"]["egress"] != base


def test_probes_ask_for_what_there_is() -> None:
    """Breaks if a pod would be killed, or never be ready, because of a route, a port or a file that does not exist."""
    settings = Settings(broker_url="memory://")
    flask = create_app(settings, typing.cast("Any", None), lambda: None)
    routes = {rule.rule for rule in flask.url_map.iter_rules()}
    ready_file = of("ConfigMap")["headrace"]["data"]["HEADRACE_READY_FILE"]
    ports = {"headrace-web": ("http", settings.port), "headrace-flower": ("flower", settings.flower_port)}
    for name in PODS:
        one = container(name)
        listening = [(port["name"], port["containerPort"]) for port in one.get("ports", ())]
        assert listening == [ports[name]] if name in ports else not listening
        probes = {key: value for key, value in one.items() if key.endswith("Probe")}
        for probe in probes.values():
            if "exec" in probe:
                assert probe["exec"]["command"] == ["test", "-e", ready_file]
            else:
                assert probe["httpGet"]["port"] == ports[name][0]
                assert probe["httpGet"]["path"] in (routes if name == "headrace-web" else {"/healthcheck"})
        assert probes or name == "headrace-migrate"
    web = container("headrace-web")
    assert web["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert web["livenessProbe"]["httpGet"]["path"] == "/livez"  # /readyz would have it killed with the broker


def test_the_ingress_lets_webhooks_in_and_nothing_else() -> None:
    """Breaks if a provider's path is closed, or if metrics stand open."""
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


def test_a_worker_may_finish_its_message() -> None:
    """Breaks if a worker is killed in the middle of a message that it would have finished."""
    for lane in (*LANES, "etl"):
        assert PODS[f"headrace-{lane}"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_lanes_are_scaled_by_their_own_depth_and_age() -> None:
    """Breaks if KEDA would scale another lane than the one that waits, or refuse the object."""
    scaled = of("ScaledObject")
    assert {one["spec"]["scaleTargetRef"]["name"] for one in scaled.values()} == {
        f"headrace-{lane}" for lane in LANES if lane != "maintenance"
    }
    known = {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod", "fallback"}
    for name, one in scaled.items():
        spec, lane = one["spec"], name.removeprefix("headrace-")
        assert spec.keys() <= known | {"triggers"}
        assert spec["scaleTargetRef"] == {"name": name}
        assert "replicas" not in of("Deployment")[name]["spec"]
        assert 1 <= spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"]
        depth, age = spec["triggers"]
        assert depth["metadata"]["query"] == f'max(headrace_lane_messages{{lane="{lane}"}})'
        assert age["metadata"]["query"] == f'max(headrace_lane_oldest_seconds{{lane="{lane}"}}) or vector(0)'
        assert (depth.get("metricType"), age["metricType"]) == (None, "Value")
        for trigger in (depth, age):
            assert trigger["type"] == "prometheus"
            assert trigger["metadata"].keys() == {"serverAddress", "query", "threshold", "ignoreNullValues"}
            assert all(isinstance(value, str) for value in trigger["metadata"].values())  # KEDA takes only text
            assert float(trigger["metadata"]["threshold"]) > 0


def test_the_example_overlay_names_an_image_of_its_own() -> None:
    """Breaks if a copy of the example would pull `latest` from nowhere."""
    assert {container(name)["image"] for name in PODS if name != "headrace-etl"} == {"registry.example/headrace:0.2.0"}
