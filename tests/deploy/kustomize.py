"""As much of kustomize as deploy/kubernetes uses, so that what reaches a cluster can be looked at without it."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.deploy.support import DEPLOY, documents

Resource = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "labels", "patches", "nameSuffix", "replicas"}
MERGED_BY = ("name", "mountPath")  # lists of these are merged by it; every other list is replaced


def render(folder: Path) -> list[Resource]:
    """The resources of a folder with a kustomization."""
    return _build(folder, [])


def with_component(found: list[Resource], folder: Path) -> list[Resource]:
    """What becomes of rendered resources where an overlay names a component as well."""
    return _build(folder, copy.deepcopy(found))


def _build(folder: Path, found: list[Resource]) -> list[Resource]:
    (told,) = documents(folder / "kustomization.yaml")
    assert told.keys() <= KNOWN | {"images"}, f"{folder}: more than is understood here"
    for name in told.get("resources", ()):
        found = found + list(_resources(folder / name))
    for name in told.get("components", ()):
        found = _build((folder / name).resolve(), found)
    for patch in told.get("patches", ()):
        (change,) = documents(folder / patch["path"])
        target = patch.get("target") or {"kind": change["kind"], "name": change["metadata"]["name"]}
        touched = [one for one in found if _is_meant(one, target)]
        assert touched, f"{folder / patch['path']} changes nothing"
        for one in touched:
            _merge(one, {key: value for key, value in change.items() if key not in ("apiVersion", "kind", "metadata")})
    for one in found:
        _change(one, told)
    return found


def _resources(path: Path) -> Iterator[Resource]:
    if path.is_dir():
        yield from render(path)
        return
    for document in documents(path):
        for one in document["items"] if document["kind"] == "List" else [document]:
            yield copy.deepcopy(one)  # an anchor is one object in several places


def _is_meant(one: Resource, target: dict[str, str]) -> bool:
    named = re.fullmatch(target.get("name", ".*"), one["metadata"]["name"])
    return one["kind"] == target["kind"] and named is not None


def _merge(into: Any, change: Any) -> None:
    for key, value in change.items():
        there = into.get(key)
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(there, dict):
            _merge(there, value)
        elif isinstance(value, list) and isinstance(there, list) and (by := _merged_by(value)):
            for one in value:
                same = [other for other in there if other[by] == one[by]]
                _merge(same[0], one) if same else there.append(copy.deepcopy(one))
        else:
            into[key] = copy.deepcopy(value)


def _merged_by(items: list[Any]) -> str | None:
    return next((by for by in MERGED_BY if all(isinstance(one, dict) and by in one for one in items)), None)


def _change(one: Resource, told: dict[str, Any]) -> None:
    metadata, spec = one["metadata"], one.get("spec", {})
    if one["kind"] == "Deployment":
        counts = {count["name"]: count["count"] for count in told.get("replicas", ())}
        spec["replicas"] = counts.get(metadata["name"], spec.get("replicas"))
        if spec["replicas"] is None:
            del spec["replicas"]
    if "namespace" in told and one["kind"] != "Namespace":
        metadata["namespace"] = told["namespace"]
    metadata["name"] += told.get("nameSuffix", "")
    for label in told.get("labels", ()):
        for place in _labels(one, selectors=label.get("includeSelectors", False)):
            place.update(label["pairs"])
    images = {image["name"]: f"{image['newName']}:{image['newTag']}" for image in told.get("images", ())}
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
RENDERED = {"base": render(BASE), "example": render(OVERLAY), "etl": with_component(render(BASE), ETL)}
