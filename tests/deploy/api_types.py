"""Whether an object is what the Kubernetes API takes, by the types that are made from the API's own description."""

import dataclasses
import importlib
import sys
import types
import typing
from datetime import datetime
from typing import Any

# The types want three names of the client they belong to, which would bring an HTTP client along.
_schema = types.ModuleType("lightkube.core.schema")
vars(_schema).update(dataclass=dataclasses.dataclass, field=dataclasses.field, DictMixin=object)
sys.modules.setdefault("lightkube.core", types.ModuleType("lightkube.core"))
sys.modules.setdefault("lightkube.core.schema", _schema)


def faults(one: dict[str, Any]) -> list[str]:
    """What is unknown, missing or of another type in an object; empty if nothing is."""
    group, _, version = one["apiVersion"].rpartition("/")
    module = importlib.import_module(f"lightkube.models.{group.partition('.')[0] or 'core'}_{version}")
    return _wrong(one, getattr(module, one["kind"]), one["kind"])


def _wrong(value: Any, kind: Any, where: str) -> list[str]:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Union:
        ways = [_wrong(value, one, where) for one in inner if one is not type(None)]
        return min(ways, key=len)
    if origin in (list, dict) or dataclasses.is_dataclass(kind):
        wanted = list if origin is list else dict
        if not isinstance(value, wanted):
            return [f"{where}: {value!r} is no {wanted.__name__}"]
        if dataclasses.is_dataclass(kind):
            return _wrong_object(value, kind, where)
        parts = enumerate(value) if wanted is list else value.items()
        return [fault for key, one in parts for fault in _wrong(one, inner[-1], f"{where}.{key}")]
    # bool is an int to Python, and not to the API.
    fits = kind in (Any, datetime) or (isinstance(value, kind) and isinstance(value, bool) == (kind is bool))
    return [] if fits else [f"{where}: {value!r} is no {kind.__name__}"]


def _wrong_object(value: dict[str, Any], kind: Any, where: str) -> list[str]:
    hints = typing.get_type_hints(kind)
    known = {one.metadata.get("json", one.name): one for one in dataclasses.fields(kind)}
    required = {name for name, one in known.items() if one.default is one.default_factory is dataclasses.MISSING}
    found = [f"{where}.{name}: unknown" for name in value.keys() - known.keys()]
    found += [f"{where}.{name}: missing" for name in required - value.keys()]
    for name in value.keys() & known.keys():
        found += _wrong(value[name], hints[known[name].name], f"{where}.{name}")
    return found
