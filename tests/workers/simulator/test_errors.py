"""Errors of the simulated APIs that no route causes: JSON in each aggregator's form."""

import pytest

from tests.support.simulated import KEY, KEYS
from tests.workers.simulator.schemas import errors_of

HEADERS = {"junction": {"X-Vital-API-Key": KEY}, "terra": KEYS}
TYPES = {"junction": "application/json", "terra": "application/problem+json"}


@pytest.mark.parametrize("aggregator", ["junction", "terra"])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/nowhere", 404),
        ("GET", "/v2/summary/mood", 404),
        ("GET", "/v2/userInfo/", 404),
        ("PATCH", "/v2/user", 405),
        ("DELETE", "/v2/subscriptions", 405),
    ],
)
def test_a_path_or_method_without_a_route_is_refused_in_json(api, aggregator, method, path, status):
    """Breaks if a client gets a page of HTML, or 401 although its key is right."""
    answer = api.client.open(path, method=method, headers=HEADERS[aggregator])

    assert (answer.status_code, answer.content_type) == (status, TYPES[aggregator])
    assert errors_of(aggregator, "error", answer.json) == []
    assert answer.json["detail"]
    if status == 405:
        assert answer.headers["Allow"]


def test_without_a_key_an_unknown_path_is_401(api):
    """Breaks if the routes can be listed without a key."""
    answer = api.client.get("/v2/nowhere")
    assert (answer.status_code, answer.json) == (401, {"detail": "Invalid token"})


def test_unknown_resources_and_the_simulators_own_paths_are_refused_in_json_too(api):
    assert api.get("/v2/summary/mood/someone").json == {"detail": "Not Found"}
    assert api.client.get("/simulate/nothing").json == {"detail": "Not Found"}
    assert api.client.put("/simulate/faults").json == {"detail": "Method Not Allowed"}


def test_an_error_of_the_simulator_is_json(api, monkeypatch):
    """Breaks if a defect of the simulator is answered with HTML."""
    api.client.application.config["PROPAGATE_EXCEPTIONS"] = False
    monkeypatch.setattr(api.world, "named", lambda _: 1 / 0)
    answer = api.get("/v2/user/resolve/someone")
    assert (answer.status_code, answer.json) == (500, {"detail": "Internal Server Error"})
