"""The official SDKs of Junction and Terra, in Python and JavaScript, against the simulator: every call parses.

Junction's SDKs validate each response against their generated types. Terra's SDKs validate nothing: their types are of
an older API document than the simulator's objects, which test_data.py compares with the document.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from junction import Junction
from junction.core.api_error import ApiError as JunctionError
from junction.core.parse_error import ParsingError
from terra import Terra
from terra.core.api_error import ApiError as TerraError

from app.catalogue import catalogue
from tests.support.simulated import UNTIL
from workers.simulator import Simulator, summaries
from workers.simulator.server import API_KEY as JUNCTION_API_KEY
from workers.simulator.terra.api import API_KEY, DEV_ID

USERS, DAYS = 6, 30
SDKS = Path(__file__).parent / "sdks"
WINDOW = {"start_date": f"{UNTIL - timedelta(days=7):%Y-%m-%d}", "end_date": f"{UNTIL:%Y-%m-%d}"}
WIDE = WINDOW | {"start_date": f"{UNTIL - timedelta(days=29):%Y-%m-%d}"}
SUMMARIES = ("activity", "body", "electrocardiogram", "meal", "menstrual_cycle", "sleep", "sleep_cycle", "workouts")
RAW = ("activity", "body", "sleep", "workouts")
TERRA = ("activity", "body", "daily", "menstruation", "nutrition", "sleep")


NO_CONTENT = ("patch",)  # methods whose response has status 204


def junction_calls(simulator):
    """The calls about wearables that the simulator serves, as (group, method, arguments)."""
    world = simulator.world
    user, other = world.members[0].user_id, world.members[-1]
    link = python_client("junction", simulator).link.token(user_id=user).link_token
    record = {
        name: world.record(world.latest(world.members[0].connections[0], catalogue()[name]))["id"]
        for name in ("workouts", "sleep", "device")
    }
    demo = {"user_id": other.user_id, "provider": "oura"}
    return [
        *((name, "get", {"user_id": user, **WIDE}) for name in SUMMARIES),
        *((name, "get_raw", {"user_id": user, **WINDOW}) for name in RAW),
        *((name, "get_raw", {"user_id": user}) for name in ("profile", "devices")),
        ("profile", "get", {"user_id": user}),
        *(
            ("vitals", f"{resource.path.split('/')[-2]}_grouped", {"user_id": user, **WINDOW})
            for resource in catalogue().of_kind("timeseries")
            if not resource.legacy
        ),
        ("workouts", "get_by_workout_id", {"workout_id": record["workouts"]}),
        ("sleep", "get_stream_by_sleep_id", {"sleep_id": record["sleep"]}),
        ("introspect", "get_user_resources", {"user_limit": 2}),
        ("introspect", "get_user_historical_pulls", {"user_id": user}),
        ("providers", "get_all", {}),
        ("user", "get_all", {"limit": 2}),
        ("user", "get", {"user_id": user}),
        ("user", "get_by_client_user_id", {"client_user_id": world.members[0].client_user_id}),
        ("user", "get_connected_providers", {"user_id": user}),
        ("user", "get_devices", {"user_id": user}),
        ("user", "get_device", {"user_id": user, "device_id": record["device"]}),
        ("user", "get_user_sign_in_token", {"user_id": user}),
        ("user", "patch", {"user_id": user, "client_user_id": "renamed", "fallback_time_zone": "Europe/Brussels"}),
        ("user", "get", {"user_id": user}),
        ("user", "refresh", {"user_id": user, "timeout": 10}),
        ("user", "create", {"client_user_id": "new"}),
        ("link", "get_all_providers", {}),
        ("link", "token", {"user_id": user}),
        ("link", "generate_oauth_link", {"oauth_provider": "oura", "vital_link_token": link}),
        ("link", "code_create", {"user_id": user}),
        ("link", "connect_demo_provider", demo),
        ("user", "deregister_provider", demo),
        ("user", "delete", {"user_id": other.user_id}),
        ("user", "undo_delete", {"user_id": other.user_id}),
    ]


def terra_calls(terra):
    """The calls that read, and those about accounts."""
    having = {kind.name: account for account in terra.accounts() for kind in terra.kinds(account)}
    user = having["daily"]
    read = {"to_webhook": False, "with_samples": True, **WINDOW}
    return [
        # Twice, because the first response about a Garmin account has no data.
        *2 * [(name, "fetch", {"user_id": having[name].user_id, **read}) for name in TERRA],
        ("daily", "fetch", {"user_id": user.user_id, "to_webhook": True, **WINDOW}),
        ("athlete", "fetch", {"user_id": user.user_id, "to_webhook": False}),
        ("plannedworkout", "fetch", {"user_id": having["planned_workout"].user_id, **WINDOW}),
        ("user", "get_all_user_ids", {}),
        ("user", "get_all_user_ids", {"page": 0, "per_page": 5}),
        ("user", "get_info_for_user_id", {"user_id": user.user_id}),
        ("user", "get_info_for_user_id", {"reference_id": user.person.client_user_id}),
        ("user", "get_info_for_multiple_user_ids", {"request": [user.user_id]}),
        ("user", "modify_user", {"user_id": user.user_id, "reference_id": "renamed"}),
        ("integrations", "fetch", {}),
        ("integrations", "detailed_fetch", {"sdk": True}),
        ("authentication", "authenticate_user", {"resource": "OURA", "reference_id": "new"}),
        ("authentication", "generate_widget_session", {"providers": "OURA,GARMIN", "reference_id": "new"}),
        ("authentication", "generate_auth_token", {}),
        ("authentication", "deauthenticate_user", {"user_id": having["nutrition"].user_id}),
    ]


@pytest.fixture
def simulator():
    """A simulator of its own for each walk, because some calls change it."""
    with Simulator(USERS, DAYS, until=UNTIL) as simulator:
        yield simulator


@pytest.fixture(params=["junction", "terra"])
def aggregator(request):
    return request.param


def calls_of(aggregator, simulator):
    return junction_calls(simulator) if aggregator == "junction" else terra_calls(simulator.terra)


def python_client(aggregator, simulator):
    if aggregator == "junction":
        return Junction(base_url=simulator.url, api_key=JUNCTION_API_KEY, max_retries=0)
    return Terra(base_url=simulator.terra_url, dev_id=DEV_ID, api_key=API_KEY)


def named(owner, name):
    """The attribute with this name, without regard to case and underscores, in which the SDKs differ."""
    wanted = name.replace("_", "").lower()
    return getattr(owner, next(one for one in dir(owner) if one.replace("_", "").lower() == wanted))


def walk_in_python(aggregator, simulator, calls):
    """The result of each call: (value, error), as `walk.cjs` returns them."""
    client, results = python_client(aggregator, simulator), []
    for group, method, arguments in calls:
        try:
            results.append({"value": named(getattr(client, group), method)(**arguments)})
        except (JunctionError, ParsingError, TerraError) as error:
            results.append({"error": str(error), "status": error.status_code})
    return results


@pytest.fixture(scope="session")
def node_modules():
    """The folder with the SDKs for JavaScript, from the lock with hashes. Installed once into the environment."""
    if not (npm := shutil.which("npm")) or not shutil.which("node"):
        pytest.skip("the SDKs for JavaScript need node and npm, which are not installed")
    lock = (SDKS / "package-lock.json").read_bytes()
    folder = Path(sys.prefix) / f"sdks-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not folder.exists():
        with TemporaryDirectory(dir=sys.prefix) as made:
            shutil.copytree(SDKS, copy := Path(made, "sdks"))
            subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=copy, check=True)
            copy.rename(folder)
    return folder / "node_modules"


def walk_in_javascript(aggregator, simulator, calls, node_modules):
    if aggregator == "junction":
        package, client = "@junction-api/sdk", "JunctionClient"
        options = {"baseUrl": simulator.url, "apiKey": JUNCTION_API_KEY, "maxRetries": 0}
        calls = [(*call, [{camel(name): value for name, value in given.items()}]) for *call, given in calls]
    else:
        package, client = "terra-api", "TerraClient"
        options = {"baseUrl": simulator.terra_url, "devId": DEV_ID, "apiKey": API_KEY}
        calls = [(group, method, terra_arguments(method, given)) for group, method, given in calls]
    asked = {"package": package, "client": client, "options": options, "calls": calls}
    environment = {"NODE_PATH": str(node_modules), "PATH": os.environ["PATH"]}
    command = ["node", str(SDKS / "walk.cjs")]
    ran = subprocess.run(command, input=json.dumps(asked), env=environment, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def terra_arguments(method, given):
    """The arguments of Terra's SDK for JavaScript, which takes a parameter of the path before the object."""
    if method == "modify_user":
        return [given["user_id"], {name: value for name, value in given.items() if name != "user_id"}]
    return [given.get("request", given)]


def camel(name):
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


def check(simulator, calls, results, prepared):
    """Fails if a call failed, or a response has no content. `prepared` requests were made before the calls."""
    pairs = zip(calls, results, strict=True)
    assert [(*call[:2], one) for call, one in pairs if not one.get("value") and call[1] not in NO_CONTENT] == []
    assert [one["error"] for one in results if "error" in one] == []
    assert [one["path"] for one in simulator.requests if one["status"] not in (200, 204)] == []
    assert len(simulator.requests) == len(calls) + prepared


def test_every_call_of_the_python_sdk_parses(aggregator, simulator):
    """Breaks if a route of the public API is missing, or a response does not have the SDK's types."""
    calls, prepared = calls_of(aggregator, simulator), len(simulator.requests)
    check(simulator, calls, walk_in_python(aggregator, simulator, calls), prepared)


def test_every_call_of_the_javascript_sdk_parses(aggregator, simulator, node_modules):
    """Breaks if a route of the public API is missing, or a response does not have the SDK's types."""
    calls, prepared = calls_of(aggregator, simulator), len(simulator.requests)
    check(simulator, calls, walk_in_javascript(aggregator, simulator, calls, node_modules), prepared)


def test_a_response_of_another_type_does_not_parse(simulator, monkeypatch):
    """Breaks if Junction's SDK accepts any response, so that the walk proves nothing."""
    monkeypatch.setitem(summaries.FIELDS, "calories_total", "many")
    calls = [("activity", "get", {"user_id": simulator.world.members[0].user_id, **WINDOW})]
    (result,) = walk_in_python("junction", simulator, calls)
    assert "activity.0.calories_total" in result["error"]


def test_the_sdks_read_the_errors(aggregator, simulator):
    """Breaks if an unknown user or an unknown path is refused with a body that is not JSON."""
    calls = {
        "junction": [("user", "get", {"user_id": "nobody"}, 404), ("team", "get_source_priorities", {}, 404)],
        "terra": [
            ("user", "get_info_for_user_id", {"user_id": "nobody"}, 404),
            ("user", "modify_user", {"user_id": "nobody"}, 404),
            ("nutrition", "delete", {"user_id": "nobody", "data": ["x"]}, 405),
        ],
    }[aggregator]
    client = python_client(aggregator, simulator)
    for group, method, arguments, status in calls:
        with pytest.raises((JunctionError, TerraError)) as raised:
            named(getattr(client, group), method)(**arguments)
        assert raised.value.status_code == status
        assert raised.value.body["detail"]
