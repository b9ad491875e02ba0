"""Validates objects against the types of the Kubernetes API, which lightkube generates from its OpenAPI description."""

import dataclasses
import importlib
import sys
import types
import typing
from datetime import datetime
from typing import Any

# The types import three names from the lightkube client, which would import an HTTP client. These are stubs for them.
_schema = types.ModuleType("lightkube.core.schema")
vars(_schema).update(dataclass=dataclasses.dataclass, field=dataclasses.field, DictMixin=object)
sys.modules.setdefault("lightkube.core", types.ModuleType("lightkube.core"))
sys.modules.setdefault("lightkube.core.schema", _schema)


def faults(one: dict[str, Any]) -> list[str]:
    """The errors of an object: unknown fields, missing fields and wrong types."""
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
            return [f"{where}: {value!r} is not of type {wanted.__name__}"]
        if dataclasses.is_dataclass(kind):
            return _wrong_object(value, kind, where)
        parts = enumerate(value) if wanted is list else value.items()
        return [fault for key, one in parts for fault in _wrong(one, inner[-1], f"{where}.{key}")]
    # In Python a bool is an int; in the API it is not.
    is_valid = kind in (Any, datetime) or (isinstance(value, kind) and isinstance(value, bool) == (kind is bool))
    return [] if is_valid else [f"{where}: {value!r} is not of type {kind.__name__}"]


def _wrong_object(value: dict[str, Any], kind: Any, where: str) -> list[str]:
    hints = typing.get_type_hints(kind)
    known = {one.metadata.get("json", one.name): one for one in dataclasses.fields(kind)}
    required = {name for name, one in known.items() if one.default is one.default_factory is dataclasses.MISSING}
    found = [f"{where}.{name}: unknown" for name in value.keys() - known.keys()]
    found += [f"{where}.{name}: missing" for name in required - value.keys()]
    for name in value.keys() & known.keys():
        found += _wrong(value[name], hints[known[name].name], f"{where}.{name}")
    return found
