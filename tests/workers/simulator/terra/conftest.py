"""A client of the simulated Terra API, with a world of its own."""

import pytest

from tests.support.simulated import KEYS, UNTIL
from workers.simulator.server import Simulator


class Api:
    """Sends requests to the API of a world, with the keys."""

    def __init__(self):
        simulator = Simulator(6, 20, until=UNTIL)
        self.terra, self.admin, self.faults = simulator.terra, simulator.terra_admin, simulator.faults
        self.client = simulator.app.test_client()

    def account(self, provider):
        return next(account for account in self.terra.accounts() if account.provider.slug == provider)

    def get(self, kind, account, **query):
        query = {"user_id": account.user_id, "to_webhook": "false", "with_samples": "true"} | query
        return self.client.get(f"/v2/{kind}", query_string=query, headers=KEYS)

    def post(self, path, body):
        return self.client.post(path, json=body, headers=KEYS)


@pytest.fixture
def api():
    return Api()


@pytest.fixture
def terra(api):
    return api.terra
