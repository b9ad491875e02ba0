"""The refresh of a user: its response, refusals and rate limit."""

import pytest

from workers.simulator.conditions import State
from workers.simulator.events import supplied


def refresh(api, user=0, **query):
    return api.post(f"/v2/user/refresh/{api.world.members[user].user_id}", query_string=query)


def test_a_refresh_names_every_source_once(api):
    """Breaks if the response differs from Junction's form, or leaves out a source."""
    answer = refresh(api, timeout=30)

    user = api.world.members[0]
    sources = [f"{each.provider.slug}/{resource.name}" for each in user.connections for resource in supplied(each)]
    assert answer.status_code == 200
    assert answer.json == {
        "success": True,
        "user_id": user.user_id,
        "refreshed_sources": sources,
        "in_progress_sources": [],
        "failed_sources": [],
    }
    assert f"{user.connections[0].provider.slug}/sleep" in sources


def test_the_sources_of_a_broken_connection_fail(api):
    """Breaks if a refresh reports success for a source that cannot be read."""
    broken = api.world.members[0].connections[1]
    api.world.conditions.put_state(State("error", broken.user_id, broken.provider.slug))

    body = refresh(api).json

    assert {source.split("/")[0] for source in body["failed_sources"]} == {broken.provider.slug}
    assert len(body["failed_sources"]) == len(supplied(broken))
    assert not {source.split("/")[0] for source in body["refreshed_sources"]} & {broken.provider.slug}


def test_without_a_connection_there_is_nothing_to_refresh(api):
    """Breaks if the error differs from Junction's form."""
    user_id = api.world.members[0].user_id
    api.world.conditions.put_state(State("deregistered", user_id))

    answer = refresh(api)

    assert answer.status_code == 400
    assert answer.json == {
        "success": False,
        "user_id": user_id,
        "error": "user has no connected sources",
        "failed_sources": [],
    }
    assert refresh(api, user=1).status_code == 200


def test_the_ninth_refresh_within_an_hour_must_wait_and_only_that_users(api, clock):
    """Breaks if the limit is not eight in any hour, is shared by users, or Retry-After is wrong."""
    assert refresh(api).status_code == 200
    clock[0] += 600
    assert [refresh(api).status_code for _ in range(7)] == [200] * 7

    refused = refresh(api)

    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "3000")
    assert refresh(api, user=1).status_code == 200
    clock[0] += 3000
    assert [refresh(api).status_code for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("timeout", ["4.9", "60.5", "soon", "nan"])
def test_a_timeout_out_of_range_is_refused_and_not_counted(api, timeout):
    assert refresh(api, timeout=timeout).status_code == 422
    assert [refresh(api, timeout="5.5").status_code for _ in range(8)] == [200] * 8


def test_an_unknown_user_cannot_be_refreshed(api):
    """Breaks if an unknown user, or a request without a key, gets another response than 404 or 401."""
    assert api.post("/v2/user/refresh/00000000-0000-0000-0000-000000000000").status_code == 404
    assert api.client.post(f"/v2/user/refresh/{api.world.members[0].user_id}").status_code == 401
    assert [entry["method"] for entry in api.client.get("/simulate/requests").json] == ["POST", "POST"]
