"""The rate limits and pauses that all workers share, on a real Valkey."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import redis

from app.config.settings import Settings
from app.errors import TryLater
from workers.fetch.rate_limits import FAILURES, PREFIX, Failures, Pause, Throttle, failures, key_ids, pauses

MINUTE = 60.0
NOWHERE = "redis://:sesame@127.0.0.1:1/0"


@pytest.fixture
def given(plain_settings: Settings, broker_url: str) -> Settings:
    """Settings with a rate limit that no test reaches by chance."""
    return replace(plain_settings, broker_url=broker_url, request_rate="100000/minute")


def left(settings: Settings) -> dict[str, float]:
    """The seconds that each account is still paused."""
    return {one.account: one.seconds for one in pauses(settings)}


def test_a_free_account_does_not_wait(given: Settings) -> None:
    """Breaks if workers wait without a reason."""
    throttle = Throttle(given)
    assert [throttle.wait("junction") for _ in range(100)] == [0.0] * 100
    assert pauses(given) == []


def test_a_pause_applies_to_all_workers_and_one_account(given: Settings) -> None:
    """Breaks if another worker, or one that starts later, sends requests, or other accounts are paused too."""
    first, second = Throttle(given), Throttle(given)
    first.pause("junction", MINUTE, "status 429")
    for throttle in (first, second, Throttle(given)):
        assert MINUTE - 5 < throttle.wait("junction") <= MINUTE + 0.01
        assert throttle.wait("terra") == 0.0
        assert throttle.wait("junction2") == 0.0


@pytest.mark.parametrize(("first", "second"), [(MINUTE, 1.0), (1.0, MINUTE), (MINUTE, MINUTE), (MINUTE, 0.0)])
def test_the_longer_pause_wins(given: Settings, first: float, second: float) -> None:
    """Breaks if a later response shortens a pause."""
    Throttle(given).pause("junction", first, "first")
    Throttle(given).pause("junction", second, "second")
    assert MINUTE - 5 < left(given)["junction"] <= MINUTE + 0.01


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_a_pause_ends(given: Settings, seconds: float) -> None:
    """Breaks if an account stays paused forever, even after a Retry-After of 0."""
    throttle = Throttle(given)
    throttle.pause("junction", seconds, "status 429")
    time.sleep(0.1)
    assert throttle.wait("junction") == 0.0
    assert pauses(given) == []


def test_a_pause_has_a_duration_and_a_reason(given: Settings) -> None:
    """Breaks if `headrace status` does not show that a key is refused, or shows other keys as pauses."""
    assert pauses(given) == []
    throttle = Throttle(given)
    throttle.wait("junction")
    throttle.pause("junction", 300, "status 401: the API key is refused")
    throttle.pause("terra", 20, "status 429")
    with redis.Redis.from_url(given.need_broker()) as client:
        client.set(PREFIX + "endless", "nobody set it so")
    found = sorted(pauses(given), key=lambda pause: pause.account)
    assert [(one.account, one.reason) for one in found] == [
        ("junction", "status 401: the API key is refused"),
        ("terra", "status 429"),
    ]
    assert all(isinstance(one, Pause) for one in found)
    assert 290 < found[0].seconds <= 300.01
    assert 10 < found[1].seconds <= 20.01


@pytest.mark.parametrize("rate", ["4/minute", "4/hour"])
def test_workers_share_one_rate(given: Settings, rate: str) -> None:
    """Breaks if each worker has its own rate limit: ten workers would send ten times as many requests."""
    limited = replace(given, request_rate=rate)
    first, second = Throttle(limited), Throttle(limited)
    answers = [(first if number % 2 else second).wait("junction") for number in range(10)]
    assert answers[:4] == [0.0] * 4
    longest = 3600 if rate.endswith("hour") else 60
    assert all(longest - 10 < seconds <= longest + 1 for seconds in answers[4:])
    assert first.wait("terra") == 0.0


def test_a_used_up_rate_becomes_free(given: Settings) -> None:
    """Breaks if a rate limit that was reached never becomes free, or the wait is longer than the window."""
    throttle = Throttle(replace(given, request_rate="2/second"))
    while (seconds := throttle.wait("junction")) == 0.0:
        pass
    assert 0.05 <= seconds <= 1.1
    time.sleep(1.1)
    assert throttle.wait("junction") == 0.0


def test_a_pause_counts_no_requests(given: Settings) -> None:
    """Breaks if attempts during a pause count against the rate limit."""
    throttle = Throttle(replace(given, request_rate="1/hour"))
    throttle.pause("junction", 0.3, "status 429")
    for _ in range(5):
        assert 0 < throttle.wait("junction") <= 0.301
    time.sleep(0.4)
    assert throttle.wait("junction") == 0.0
    assert throttle.wait("junction") > 1


@pytest.mark.parametrize("way", ["wait", "pause"])
@pytest.mark.parametrize("beside_amqp", [False, True])
def test_without_redis_no_request_is_sent(plain_settings: Settings, way: str, *, beside_amqp: bool) -> None:
    """Breaks if a worker sends requests without knowing those of other workers, or shows the password."""
    urls = {"broker_url": "amqp://nobody", "redis_url": NOWHERE} if beside_amqp else {"broker_url": NOWHERE}
    throttle = Throttle(replace(plain_settings, **urls))
    with pytest.raises(TryLater) as error:
        throttle.wait("junction") if way == "wait" else throttle.pause("junction", 1, "status 429")
    assert "REDIS_URL" in str(error.value)
    assert "sesame" not in str(error.value)


def test_a_foreign_key_is_no_pause(given: Settings) -> None:
    """Breaks if a foreign key pauses an account forever, or prevents a real pause."""
    with redis.Redis.from_url(given.need_broker()) as client:
        client.lpush(PREFIX + "junction", "a list")
    throttle = Throttle(given)
    assert throttle.wait("junction") == 0.0  # without a time to live it is no pause
    throttle.pause("junction", MINUTE, "status 429")
    assert throttle.wait("junction") > 1


def test_redis_url_goes_before_the_broker(given: Settings) -> None:
    """Breaks if rate limits are looked for in RabbitMQ."""
    beside = replace(given, broker_url="amqp://nobody", redis_url=given.broker_url)
    Throttle(beside).pause("junction", MINUTE, "status 429")
    assert Throttle(given).wait("junction") > 1
    assert left(beside).keys() == {"junction"}


def narrow(given: Settings, account: str, provider: str | None) -> Settings:
    """Settings with these rate limits."""
    return replace(given, request_rate=account, provider_rate=provider)


def test_one_provider_does_not_hold_up_the_others(given: Settings) -> None:
    """Breaks if a provider's limit applies to other providers, is not shared, or counts requests without a provider."""
    limited = narrow(given, "1000/hour", "3/hour")
    first, second = Throttle(limited), Throttle(limited)
    answers = [(first if number % 2 else second).wait("junction", "garmin") for number in range(5)]
    assert answers[:3] == [0.0] * 3
    assert all(3590 < seconds <= 3601 for seconds in answers[3:])
    for throttle in (first, second):
        assert throttle.wait("junction", "oura") == 0.0
        assert [throttle.wait("junction") for _ in range(4)] == [0.0] * 4
        assert throttle.wait("terra", "garmin") == 0.0


def test_a_request_refused_by_a_provider_rate_does_not_count_for_the_account(given: Settings) -> None:
    """Breaks if attempts for a provider at its limit count against the account's limit."""
    throttle = Throttle(narrow(given, "5/hour", "2/hour"))
    assert [throttle.wait("junction", "garmin") > 0 for _ in range(20)] == [False] * 2 + [True] * 18
    assert [throttle.wait("junction", "oura") > 0 for _ in range(3)] == [False] * 2 + [True]
    assert [throttle.wait("junction") > 0 for _ in range(2)] == [False, True]


def test_a_request_refused_by_the_account_rate_does_not_count_for_a_provider(given: Settings) -> None:
    """Breaks if attempts that the account's limit refuses count against a provider's limit."""
    full = Throttle(narrow(given, "1/hour", "2/hour"))
    assert [full.wait("junction", "garmin") > 0 for _ in range(5)] == [False] + [True] * 4
    wider = Throttle(narrow(given, "1000/minute", "2/hour"))
    assert [wider.wait("junction", "garmin") > 0 for _ in range(2)] == [False, True]


def test_without_a_provider_rate_only_the_account_rate_applies(given: Settings) -> None:
    """Breaks if providers have a limit though none is configured."""
    throttle = Throttle(narrow(given, "9/hour", None))
    assert [throttle.wait("junction", "garmin") > 0 for _ in range(10)] == [False] * 9 + [True]


def test_a_pause_comes_before_a_provider_rate(given: Settings) -> None:
    """Breaks if a request is sent while the account is paused, or the attempt counts against the provider's limit."""
    throttle = Throttle(narrow(given, "100/hour", "1/hour"))
    throttle.pause("junction", MINUTE, "status 429")
    assert all(MINUTE - 5 < throttle.wait("junction", "garmin") <= MINUTE + 0.01 for _ in range(3))
    with redis.Redis.from_url(given.need_broker()) as client:
        client.delete(PREFIX + "junction")
    assert [throttle.wait("junction", "garmin") > 0 for _ in range(2)] == [False, True]


def test_concurrent_workers_keep_a_provider_rate(given: Settings) -> None:
    """Breaks if concurrent workers exceed a provider's limit."""
    throttles = [Throttle(narrow(given, "1000/hour", "7/hour")) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: throttles[number % 4].wait("junction", "garmin"), range(40)))
    assert sum(seconds == 0.0 for seconds in answers) == 7


def test_a_named_rate_is_shared(given: Settings) -> None:
    """Breaks if workers together exceed the rate, or one user's requests count against another user's rate."""
    first, second = Throttle(given), Throttle(given)
    answers = [one.take("4/hour", "refresh", "junction", "u1") for one in (first, second) * 3]
    assert answers[:4] == [0.0] * 4
    assert all(3590 < seconds <= 3601 for seconds in answers[4:])
    for whose in (("refresh", "junction", "u2"), ("refresh", "terra", "u1"), ("other", "junction", "u1")):
        assert first.take("4/hour", *whose) == 0.0
    assert first.wait("junction") == 0.0


def test_without_redis_a_named_rate_raises(plain_settings: Settings) -> None:
    """Breaks if a worker proceeds without Redis, or shows the password."""
    with pytest.raises(TryLater) as error:
        Throttle(replace(plain_settings, broker_url=NOWHERE)).take("4/hour", "refresh")
    assert "REDIS_URL" in str(error.value)
    assert "sesame" not in str(error.value)


def test_a_pause_has_a_kind(given: Settings) -> None:
    """Breaks if only the text of the reason shows that a key is refused."""
    throttle = Throttle(given)
    throttle.pause("junction", MINUTE, "no", kind="key_refused")
    throttle.pause("terra", MINUTE, "status 429: refused")
    with redis.Redis.from_url(given.need_broker()) as client:  # in the format of older workers
        client.set(PREFIX + "old", "status 401: the API key is refused", ex=60)
        client.set(PREFIX + "odd", b'{"kind": "unheard of", "reason": "x"}', ex=60)
    found = {one.account: (one.kind, one.reason) for one in pauses(given)}
    assert found["junction"] == ("key_refused", "no")
    assert found["terra"] == ("asked", "status 429: refused")
    assert found["old"] == ("asked", "status 401: the API key is refused")
    assert found["odd"][0] == "asked"


@pytest.mark.parametrize(
    ("account", "change"),
    [
        ("junction", {"junction_api_key": "sk_us_wrong"}),
        ("junction", {"junction_api_key": None}),
        ("terra", {"terra_api_key": "wrong"}),
        ("terra", {"terra_dev_id": "wrong"}),
    ],
)
@pytest.mark.parametrize("user", ["", "u1"])
def test_another_key_has_pauses_of_its_own(given: Settings, account: str, change: dict[str, str], user: str) -> None:
    """Breaks if a wrong key in an operator's shell stops the workers, or `status` hides or misattributes its pause."""
    keys = {"junction_api_key": "sk_us_right", "terra_dev_id": "dev", "terra_api_key": "right"}
    workers = replace(given, **keys)
    shell = replace(workers, **change)
    Throttle(shell).pause(account, MINUTE, "status 401", user_id=user, kind="key_refused")
    assert Throttle(workers).wait(account) == 0.0
    assert Throttle(workers).wait_for_user(account, "u1", "100/minute") == 0.0
    shell_throttle = Throttle(shell)
    is_paused = shell_throttle.wait_for_user(account, user, "9/minute") if user else shell_throttle.wait(account)
    assert is_paused > 1
    has_key = None not in change.values()
    (seen_by_workers,), (seen_by_shell,) = pauses(workers), pauses(shell)
    assert seen_by_workers.account == (f"{account}/{user}" if user else account)
    assert (seen_by_workers.is_own, seen_by_shell.is_own) == ((False, True) if has_key else (None, None))
    Throttle(workers).pause(account, MINUTE, "status 429")
    assert sorted(str(one.is_own) for one in pauses(workers)) == (["False", "True"] if has_key else ["None", "True"])


def test_no_part_of_a_key_is_stored(given: Settings) -> None:
    """Breaks if a reader of Redis, or of `headrace status`, can recover an API key."""
    key = "sk_us_0123456789abcdefghijklmnop"
    settings = replace(given, junction_api_key=key, terra_dev_id="dev-id-of-ours", terra_api_key="terra-key-of-ours")
    throttle = Throttle(settings)
    for account in ("junction", "terra"):
        throttle.wait(account)
        throttle.pause(account, MINUTE, "status 401", kind="key_refused")
        throttle.count_failure(account, "no answer")
    with redis.Redis.from_url(given.need_broker(), decode_responses=True) as client:
        names = " ".join(client.scan_iter("*"))
    assert not any(part in names for part in (key[6:14], "dev-id", "terra-key"))
    assert {len(one) for one in key_ids(settings).values()} == {8}
    assert key_ids(settings) == {one.account: one.key for one in pauses(settings)}
    assert len(set(key_ids(settings).values())) == 2
    assert key_ids(given) == {}


def test_failures_are_counted_until_an_answer(given: Settings) -> None:
    """Breaks if `status` cannot tell an API that does not answer from a missing worker."""
    settings = replace(given, junction_api_key="sk_us_right")
    throttle = Throttle(settings)
    for reason in ("status 502", "no answer"):
        throttle.count_failure("junction", reason)
    Throttle(replace(given, junction_api_key="sk_us_other")).count_failure("junction", "no answer")
    (own,) = [one for one in failures(settings) if one.is_own]
    assert own == Failures("junction", 2, "no answer", key_ids(settings)["junction"], is_own=True)
    with redis.Redis.from_url(given.need_broker()) as client:
        assert all(0 < client.ttl(name) <= 1200 for name in client.scan_iter(FAILURES + "*"))
    throttle.clear_failures("junction")
    assert [one.is_own for one in failures(settings)] == [False]
    assert throttle.wait("junction") == 0.0


def test_answers_do_not_each_cost_a_request_to_redis(given: Settings) -> None:
    """Breaks if a worker that fetches fast asks Redis once more per page."""
    throttle = Throttle(given)
    throttle.clear_failures("junction")
    throttle.count_failure("junction", "no answer")
    throttle.clear_failures("junction")
    assert len(failures(given)) == 1
