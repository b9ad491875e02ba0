"""Response schemas of the public API documents, for routes whose responses have no recorded example."""

import json

from jsonschema import Draft202012Validator

from tests.support import ROOT


def errors_of(aggregator, route, body):
    """The differences of a response from the public schema of its route, as (path, message)."""
    document = json.loads((ROOT / "tests" / "recorded" / "schemas" / f"{aggregator}.json").read_text())
    schema = {**document["routes"][route], "components": document["components"]}
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return [(error.json_path, error.message) for error in validator.iter_errors(body)]
