"""The rate and the pauses that all workers share, on a real Valkey."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import redis

from app.config.settings import Settings
from app.errors import TryLater
from workers.fetch.rate_limits import PREFIX, Pause, Throttle, pauses

MINUTE = 60.0
NOWHERE = "redis://:sesame@127.0.0.1:1/0"


@pytest.fixture
def given(plain_settings: Settings, broker_url: str) -> Settings:
    """Settings of a worker whose rate nobody reaches by chance."""
    return replace(plain_settings, broker_url=broker_url, request_rate="100000/minute")


def left(settings: Settings) -> dict[str, float]:
    """How long each account is still silent."""
    return {one.account: one.seconds for one in pauses(settings)}


def test_a_free_account_may_be_asked_at_once(given: Settings) -> None:
    """Breaks if workers wait for nothing."""
    throttle = Throttle(given)
    assert [throttle.wait("junction") for _ in range(100)] == [0.0] * 100
    assert pauses(given) == []


def test_a_silence_is_everybodys_and_of_one_account(given: Settings) -> None:
    """Breaks if another worker, or one that starts later, goes on asking, or if other accounts are held up as well."""
    first, second = Throttle(given), Throttle(given)
    first.pause("junction", MINUTE, "status 429")
    for throttle in (first, second, Throttle(given)):
        assert MINUTE - 5 < throttle.wait("junction") <= MINUTE + 0.01
        assert throttle.wait("terra") == 0.0
        assert throttle.wait("junction2") == 0.0


@pytest.mark.parametrize(("first", "second"), [(MINUTE, 1.0), (1.0, MINUTE), (MINUTE, MINUTE), (MINUTE, 0.0)])
def test_the_longer_silence_stays(given: Settings, first: float, second: float) -> None:
    """Breaks if an answer that came on its way cuts short what another one asked for."""
    Throttle(given).pause("junction", first, "first")
    Throttle(given).pause("junction", second, "second")
    assert MINUTE - 5 < left(given)["junction"] <= MINUTE + 0.01


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_a_silence_ends_by_itself(given: Settings, seconds: float) -> None:
    """Breaks if an account stays silent for ever, even after a Retry-After of nothing."""
    throttle = Throttle(given)
    throttle.pause("junction", seconds, "status 429")
    time.sleep(0.1)
    assert throttle.wait("junction") == 0.0
    assert pauses(given) == []


def test_a_silence_says_how_long_and_why(given: Settings) -> None:
    """Breaks if `headrace status` cannot tell that a key is refused, or takes other keys for pauses."""
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
    """Breaks if each worker has a rate of its own, so that ten workers ask ten times as often."""
    limited = replace(given, request_rate=rate)
    first, second = Throttle(limited), Throttle(limited)
    answers = [(first if number % 2 else second).wait("junction") for number in range(10)]
    assert answers[:4] == [0.0] * 4
    longest = 3600 if rate.endswith("hour") else 60
    assert all(longest - 10 < seconds <= longest + 1 for seconds in answers[4:])
    assert first.wait("terra") == 0.0


def test_a_place_becomes_free_again(given: Settings) -> None:
    """Breaks if a rate that was reached once is never given back, or the pause is longer than the window."""
    throttle = Throttle(replace(given, request_rate="2/second"))
    while (seconds := throttle.wait("junction")) == 0.0:
        pass
    assert 0.05 <= seconds <= 1.1
    time.sleep(1.1)
    assert throttle.wait("junction") == 0.0


def test_a_silence_takes_no_place(given: Settings) -> None:
    """Breaks if asking during a silence uses up the rate that the time after it needs."""
    throttle = Throttle(replace(given, request_rate="1/hour"))
    throttle.pause("junction", 0.3, "status 429")
    for _ in range(5):
        assert 0 < throttle.wait("junction") <= 0.301
    time.sleep(0.4)
    assert throttle.wait("junction") == 0.0
    assert throttle.wait("junction") > 1


@pytest.mark.parametrize("way", ["wait", "pause"])
@pytest.mark.parametrize("beside_amqp", [False, True])
def test_without_redis_nobody_asks(plain_settings: Settings, way: str, *, beside_amqp: bool) -> None:
    """Breaks if a worker that cannot know what others have sent asks all the same, or names the password."""
    urls = {"broker_url": "amqp://nobody", "redis_url": NOWHERE} if beside_amqp else {"broker_url": NOWHERE}
    throttle = Throttle(replace(plain_settings, **urls))
    with pytest.raises(TryLater) as error:
        throttle.wait("junction") if way == "wait" else throttle.pause("junction", 1, "status 429")
    assert "REDIS_URL" in str(error.value)
    assert "sesame" not in str(error.value)


def test_a_key_that_something_else_wrote_is_no_silence(given: Settings) -> None:
    """Breaks if a stray key pauses an account for ever, or stands in the way of a real silence."""
    with redis.Redis.from_url(given.need_broker()) as client:
        client.lpush(PREFIX + "junction", "a list")
    throttle = Throttle(given)
    assert throttle.wait("junction") == 0.0  # no time to live: nobody's silence
    throttle.pause("junction", MINUTE, "status 429")
    assert throttle.wait("junction") > 1


def test_redis_url_goes_before_the_broker(given: Settings) -> None:
    """Breaks if rate limits are looked for in RabbitMQ."""
    beside = replace(given, broker_url="amqp://nobody", redis_url=given.broker_url)
    Throttle(beside).pause("junction", MINUTE, "status 429")
    assert Throttle(given).wait("junction") > 1
    assert left(beside).keys() == {"junction"}


def narrow(given: Settings, account: str, provider: str | None) -> Settings:
    """Settings with these rates."""
    return replace(given, request_rate=account, provider_rate=provider)


def test_one_provider_does_not_hold_up_the_others(given: Settings) -> None:
    """Breaks if a provider's rate is everybody's, is not shared by workers, or also counts what is of no provider."""
    limited = narrow(given, "1000/hour", "3/hour")
    first, second = Throttle(limited), Throttle(limited)
    answers = [(first if number % 2 else second).wait("junction", "garmin") for number in range(5)]
    assert answers[:3] == [0.0] * 3
    assert all(3590 < seconds <= 3601 for seconds in answers[3:])
    for throttle in (first, second):
        assert throttle.wait("junction", "oura") == 0.0
        assert [throttle.wait("junction") for _ in range(4)] == [0.0] * 4
        assert throttle.wait("terra", "garmin") == 0.0


def test_whoever_has_to_wait_takes_no_place_of_the_account(given: Settings) -> None:
    """Breaks if asking again and again about a provider that is full uses up what others need."""
    throttle = Throttle(narrow(given, "5/hour", "2/hour"))
    assert [throttle.wait("junction", "garmin") > 0 for _ in range(20)] == [False] * 2 + [True] * 18
    assert [throttle.wait("junction", "oura") > 0 for _ in range(3)] == [False] * 2 + [True]
    assert [throttle.wait("junction") > 0 for _ in range(2)] == [False, True]


def test_an_account_that_is_full_takes_no_place_of_a_provider(given: Settings) -> None:
    """Breaks if a provider is waited for because of requests that were never made."""
    full = Throttle(narrow(given, "1/hour", "2/hour"))
    assert [full.wait("junction", "garmin") > 0 for _ in range(5)] == [False] + [True] * 4
    wider = Throttle(narrow(given, "1000/minute", "2/hour"))
    assert [wider.wait("junction", "garmin") > 0 for _ in range(2)] == [False, True]


def test_without_a_rate_of_its_own_a_provider_has_the_accounts(given: Settings) -> None:
    """Breaks if providers are slowed down where nobody has asked for it."""
    throttle = Throttle(narrow(given, "9/hour", None))
    assert [throttle.wait("junction", "garmin") > 0 for _ in range(10)] == [False] * 9 + [True]


def test_a_silence_goes_before_a_providers_rate(given: Settings) -> None:
    """Breaks if a provider with places left is asked while the account is silent, or loses one by it."""
    throttle = Throttle(narrow(given, "100/hour", "1/hour"))
    throttle.pause("junction", MINUTE, "status 429")
    assert all(MINUTE - 5 < throttle.wait("junction", "garmin") <= MINUTE + 0.01 for _ in range(3))
    with redis.Redis.from_url(given.need_broker()) as client:
        client.delete(PREFIX + "junction")
    assert [throttle.wait("junction", "garmin") > 0 for _ in range(2)] == [False, True]


def test_workers_at_once_keep_a_providers_rate(given: Settings) -> None:
    """Breaks if workers that ask at the same moment get more places of a provider than there are."""
    throttles = [Throttle(narrow(given, "1000/hour", "7/hour")) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: throttles[number % 4].wait("junction", "garmin"), range(40)))
    assert sum(seconds == 0.0 for seconds in answers) == 7


def test_a_rate_of_its_own_is_taken(given: Settings) -> None:
    """Breaks if more is asked for than may be, by whatever worker, or one person's places are another's."""
    first, second = Throttle(given), Throttle(given)
    answers = [one.take("4/hour", "refresh", "junction", "u1") for one in (first, second) * 3]
    assert answers[:4] == [0.0] * 4
    assert all(3590 < seconds <= 3601 for seconds in answers[4:])
    for whose in (("refresh", "junction", "u2"), ("refresh", "terra", "u1"), ("other", "junction", "u1")):
        assert first.take("4/hour", *whose) == 0.0
    assert first.wait("junction") == 0.0


def test_without_redis_nothing_is_taken(plain_settings: Settings) -> None:
    """Breaks if a worker that cannot count takes all the same, or names the password."""
    with pytest.raises(TryLater) as error:
        Throttle(replace(plain_settings, broker_url=NOWHERE)).take("4/hour", "refresh")
    assert "REDIS_URL" in str(error.value)
    assert "sesame" not in str(error.value)


def test_a_silence_says_of_which_kind_it_is(given: Settings) -> None:
    """Breaks if it has to be read out of the reason whether a key is refused."""
    throttle = Throttle(given)
    throttle.pause("junction", MINUTE, "no", kind="key_refused")
    throttle.pause("terra", MINUTE, "status 429: refused")
    with redis.Redis.from_url(given.need_broker()) as client:  # as older workers write it
        client.set(PREFIX + "old", "status 401: the API key is refused", ex=60)
        client.set(PREFIX + "odd", b'{"kind": "unheard of", "reason": "x"}', ex=60)
    found = {one.account: (one.kind, one.reason) for one in pauses(given)}
    assert found["junction"] == ("key_refused", "no")
    assert found["terra"] == ("asked", "status 429: refused")
    assert found["old"] == ("asked", "status 401: the API key is refused")
    assert found["odd"][0] == "asked"
