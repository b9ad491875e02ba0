"""The features of kustomize that deploy/kubernetes uses, so that tests can render the manifests without kubectl."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.deploy.support import DEPLOY, documents

Resource = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "labels", "patches", "nameSuffix", "replicas"}
MERGED_BY = ("name", "mountPath")  # lists of objects with such a key are merged by it; other lists are replaced


def render(folder: Path) -> list[Resource]:
    """The resources of a folder with a kustomization."""
    return _build(folder, [])


def with_component(found: list[Resource], folder: Path) -> list[Resource]:
    """Rendered resources with a component applied, as an overlay does that names it."""
    return _build(folder, copy.deepcopy(found))


def _build(folder: Path, found: list[Resource]) -> list[Resource]:
    (kustomization,) = documents(folder / "kustomization.yaml")
    assert kustomization.keys() <= KNOWN | {"images"}, f"{folder}: a field that this module does not implement"
    for name in kustomization.get("resources", ()):
        found = found + list(_resources(folder / name))
    for name in kustomization.get("components", ()):
        found = _build((folder / name).resolve(), found)
    for patch in kustomization.get("patches", ()):
        (change,) = documents(folder / patch["path"])
        target = patch.get("target") or {"kind": change["kind"], "name": change["metadata"]["name"]}
        targets = [one for one in found if _is_target(one, target)]
        assert targets, f"{folder / patch['path']} changes nothing"
        for one in targets:
            _merge(one, {key: value for key, value in change.items() if key not in ("apiVersion", "kind", "metadata")})
    for one in found:
        _change(one, kustomization)
    return found


def _resources(path: Path) -> Iterator[Resource]:
    if path.is_dir():
        yield from render(path)
        return
    for document in documents(path):
        for one in document["items"] if document["kind"] == "List" else [document]:
            yield copy.deepcopy(one)  # a YAML anchor is one object in several places


def _is_target(one: Resource, target: dict[str, str]) -> bool:
    named = re.fullmatch(target.get("name", ".*"), one["metadata"]["name"])
    return one["kind"] == target["kind"] and named is not None


def _merge(into: Any, change: Any) -> None:
    for key, value in change.items():
        existing = into.get(key)
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(existing, dict):
            _merge(existing, value)
        elif isinstance(value, list) and isinstance(existing, list) and (by := _merged_by(value)):
            for one in value:
                same = [other for other in existing if other[by] == one[by]]
                _merge(same[0], one) if same else existing.append(copy.deepcopy(one))
        else:
            into[key] = copy.deepcopy(value)


def _merged_by(items: list[Any]) -> str | None:
    return next((by for by in MERGED_BY if all(isinstance(one, dict) and by in one for one in items)), None)


def _change(one: Resource, kustomization: dict[str, Any]) -> None:
    metadata, spec = one["metadata"], one.get("spec", {})
    if one["kind"] == "Deployment":
        counts = {count["name"]: count["count"] for count in kustomization.get("replicas", ())}
        spec["replicas"] = counts.get(metadata["name"], spec.get("replicas"))
        if spec["replicas"] is None:
            del spec["replicas"]
    if "namespace" in kustomization and one["kind"] != "Namespace":
        metadata["namespace"] = kustomization["namespace"]
    metadata["name"] += kustomization.get("nameSuffix", "")
    for label in kustomization.get("labels", ()):
        for place in _labels(one, selectors=label.get("includeSelectors", False)):
            place.update(label["pairs"])
    images = {image["name"]: f"{image['newName']}:{image['newTag']}" for image in kustomization.get("images", ())}
    for container in spec.get("template", {}).get("spec", {}).get("containers", ()):
        name = container.get("image", "").partition(":")[0]
        if name in images:
            container["image"] = images[name]


def _labels(one: Resource, *, selectors: bool) -> Iterator[dict[str, str]]:
    yield one["metadata"].setdefault("labels", {})
    spec = one.get("spec", {})
    if "template" in spec:
        yield spec["template"]["metadata"]["labels"]
    if selectors and "matchLabels" in spec.get("selector", {}):
        yield spec["selector"]["matchLabels"]


FOLDER = DEPLOY / "kubernetes"
BASE, OVERLAY, ETL = FOLDER / "base", FOLDER / "overlays" / "example", FOLDER / "etl"
HIGH_AVAILABILITY = FOLDER / "overlays" / "high-availability"
RENDERED = {
    "base": render(BASE),
    "example": render(OVERLAY),
    "etl": with_component(render(BASE), ETL),
    "high-availability": render(HIGH_AVAILABILITY),
}
