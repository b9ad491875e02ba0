"""A client of the simulated Junction API, with a world of its own."""

from functools import partial

import pytest

from app.catalogue import catalogue
from tests.support.simulated import KEY, UNTIL
from workers.simulator.server import Simulator


class Api:
    """Sends requests to the API of a world, with the key."""

    def __init__(self, *, users, days, until, page_size):
        simulator = Simulator(users, days, until=until, page_size=page_size)
        self.world, self.faults, self.client = simulator.world, simulator.faults, simulator.app.test_client()

    def get(self, path, **query):
        return self.client.get(path, query_string=query, headers={"X-Vital-API-Key": KEY})

    def post(self, path, **options):
        return self.client.post(path, headers={"X-Vital-API-Key": KEY}, **options)

    def path(self, resource, user=0):
        return catalogue()[resource].path.format(user_id=self.world.members[user].user_id)

    def of(self, resource, user=0, **query):
        return self.get(self.path(resource, user), **query)

    def pages(self, ask, **query):
        """All pages of `ask(next_cursor=...)`; fails if a cursor repeats."""
        pages, cursors = [], []
        while not pages or cursors[-1]:
            pages.append(ask(**query, **({"next_cursor": cursors[-1]} if cursors else {})).json)
            cursors.append(pages[-1]["next_cursor"])
            assert cursors.count(cursors[-1]) == 1
        return pages


@pytest.fixture
def make_api():
    return partial(Api, users=2, days=20, until=UNTIL, page_size=500)


@pytest.fixture
def api(make_api):
    return make_api()


@pytest.fixture
def clock(monkeypatch):
    """The simulator's monotonic clock, as a list with one number."""
    now = [1000.0]
    monkeypatch.setattr("workers.simulator.budget.monotonic", lambda: now[0])
    return now
