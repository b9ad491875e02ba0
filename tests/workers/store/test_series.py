"""Series numbers."""

import threading
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine

from tests.support import rows
from workers.actions import SeriesKey
from workers.store.series import MAX_CACHED, SeriesNumbers


def keys(user: str, count: int = 3) -> list[SeriesKey]:
    return [(user, "heartrate", "oura", "ring", str(number)) for number in range(count)]


def test_a_series_keeps_its_number(shared: Engine) -> None:
    """Breaks if another process, or the same one later, assigns a new number: samples would be duplicated."""
    numbers = SeriesNumbers(shared)
    first = numbers.of("junction", keys("keeps"))
    assert len(set(first.values())) == 3
    assert numbers.of("junction", keys("keeps")) == first
    assert SeriesNumbers(shared).of("junction", reversed(keys("keeps"))) == first


def test_each_part_of_the_key_makes_another_series(shared: Engine) -> None:
    """Breaks if two users' or two devices' samples share a series."""
    base = ("parts", "heartrate", "oura", "ring", "")
    others = [(*base[:place], f"{base[place]}2", *base[place + 1 :]) for place in range(5)]
    assert len(set(SeriesNumbers(shared).of("junction", [base, *others]).values())) == 6


def test_known_and_new_series_together(shared: Engine) -> None:
    """Breaks if a new series among known ones is not registered, or a repeated key fails."""
    numbers = SeriesNumbers(shared)
    known = numbers.of("junction", keys("mixed", 2))
    found = numbers.of("junction", keys("mixed", 4) * 2)
    assert len(found) == 4
    assert found.items() >= known.items()


def test_an_empty_request_returns_nothing(shared: Engine) -> None:
    """Breaks if a message without samples fails."""
    assert SeriesNumbers(shared).of("junction", []) == {}


def test_any_text_is_a_valid_name(shared: Engine) -> None:
    """Breaks if a quote, a comma or an empty text in a name is read as array syntax."""
    strange: SeriesKey = ("a,b", 'quo"te', "{NULL}", "back\\slash", "")
    number = SeriesNumbers(shared).of("junction", [strange])[strange]
    query = "SELECT user_id, resource, provider, source_type, subtype FROM headrace.series WHERE id = :id"
    assert tuple(rows(shared, query, id=number)[0].values()) == strange


def test_concurrent_workers_assign_one_number(shared: Engine) -> None:
    """Breaks if workers that register the same series concurrently deadlock, fail or number it twice."""
    together = threading.Barrier(3)

    def ask(number: int) -> dict[SeriesKey, int]:
        wanted = keys("together", 200)
        together.wait(20)
        return SeriesNumbers(shared).of("junction", wanted[::-1] if number % 2 else wanted)

    with ThreadPoolExecutor(3) as pool:
        one, two, three = pool.map(ask, range(3))
    assert one == two == three
    assert rows(shared, "SELECT count(*) AS n FROM headrace.series WHERE user_id = 'together'") == [{"n": 200}]


def test_the_cache_is_bounded(shared: Engine) -> None:
    """Breaks if a worker's memory grows with every user, or the cache drops a key of the current request."""
    numbers = SeriesNumbers(shared)
    first = numbers.of("junction", keys("bounded", 2))
    numbers._known |= {("filler", str(number), "", "", ""): -number for number in range(MAX_CACHED - 2)}
    found = numbers.of("junction", keys("bounded", 3))
    assert len(found) == 3
    assert found.items() >= first.items()
    assert len(numbers._known) == 3
