"""The simulated aggregators over HTTP: serving, stopping, and faults of the connection."""

import signal
import time
from datetime import UTC, datetime
from threading import Event

import httpx
import pytest

from tests.support import HTTP
from workers.simulator import Simulator, _stop
from workers.simulator.server import API_KEY

UNTIL = datetime(2026, 11, 20, 12, tzinfo=UTC)


def test_the_server_serves_what_the_world_holds_and_stops():
    with Simulator(users=1, days=2, until=UNTIL) as simulator:
        headers = {"X-Vital-API-Key": API_KEY}
        users = HTTP.get(f"{simulator.url}/v2/user", headers=headers).json()["users"]
        assert [user["user_id"] for user in users] == [simulator.world.members[0].user_id]
        assert [entry["path"] for entry in simulator.requests] == ["/v2/user"]
        url = simulator.url

    with pytest.raises(httpx.ConnectError):
        HTTP.get(f"{url}/v2/user", headers=headers)


def test_a_truncated_answer_breaks_off_and_a_slow_one_is_late():
    with Simulator(users=1, days=2, until=UNTIL) as simulator:
        headers = {"X-Vital-API-Key": API_KEY}
        simulator.faults.add("truncated", times=1)
        with pytest.raises(httpx.RemoteProtocolError):
            HTTP.get(f"{simulator.url}/v2/user", headers=headers)

        simulator.faults.add("slow", times=1, seconds=0.2)
        started = time.monotonic()
        assert HTTP.get(f"{simulator.url}/v2/user", headers=headers).status_code == 200
        assert time.monotonic() - started >= 0.2


def test_the_address_of_a_simulator_that_does_not_serve_is_an_error():
    with pytest.raises(RuntimeError):
        _ = Simulator().url


def test_a_second_signal_ends_the_process():
    """Breaks if a signal during the handler of another one waits for ever for the lock of `Event.set`."""
    before = signal.getsignal(signal.SIGUSR1)
    stop = Event()
    _stop(signal.SIGUSR1, stop)
    assert (stop.is_set(), signal.getsignal(signal.SIGUSR1)) == (True, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, before)
