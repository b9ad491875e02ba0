"""A client of the simulated Terra API, with a world of its own."""

import pytest

from tests.support.simulated import KEY, KEYS, UNTIL
from workers.simulator.api import create_api
from workers.simulator.data import World
from workers.simulator.faults import Faults
from workers.simulator.terra.data import TerraWorld


class Api:
    """Sends requests to the API of a world, with the keys."""

    def __init__(self, world):
        self.terra = TerraWorld(world)
        self.faults = Faults(world.seed)
        self.client = create_api(world, KEY, self.faults, terra=self.terra).test_client()

    def account(self, provider):
        return next(account for account in self.terra.accounts() if account.provider.slug == provider)

    def get(self, kind, account, **query):
        query = {"user_id": account.user_id, "to_webhook": "false", "with_samples": "true"} | query
        return self.client.get(f"/v2/{kind}", query_string=query, headers=KEYS)

    def post(self, path, body):
        return self.client.post(path, json=body, headers=KEYS)


@pytest.fixture
def api():
    return Api(World(1, 6, UNTIL, 20))


@pytest.fixture
def terra(api):
    return api.terra
