"""What the tests of the simulator share: the moment at which its worlds end, and the keys of its clients."""

from datetime import UTC, datetime

from workers.simulator.terra.api import API_KEY, DEV_ID

UNTIL = datetime(2026, 11, 20, 12, 34, 56, tzinfo=UTC)
KEY = "sk_us_test"
KEYS = {"dev-id": DEV_ID, "x-api-key": API_KEY}  # of Terra
