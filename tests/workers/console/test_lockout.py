"""Failed logins lock a name, an address or all logins, in memory of a fixed size."""

from tests.support.console import Clock
from workers.console.lockout import BUCKETS, Lockout


def fail(lockout: Lockout, times: int, name: str = "ada", address: str = "a1") -> None:
    for _ in range(times):
        lockout.fail(name, address)


def test_a_name_is_locked_for_longer_after_each_failure(clock: Clock) -> None:
    lockout = Lockout(clock)
    fail(lockout, 4)
    assert lockout.seconds_left("ada", "a1") == 0
    fail(lockout, 1)
    assert lockout.seconds_left("ada", "a1") == 30
    assert lockout.seconds_left("ada", "another") == 30
    clock.now += 30
    assert lockout.seconds_left("ada", "a1") == 0
    fail(lockout, 1)
    assert lockout.seconds_left("ada", "a1") == 60


def test_many_names_from_one_address_lock_the_address(clock: Clock) -> None:
    """Breaks if one password can be tried with any number of names."""
    lockout = Lockout(clock)
    for number in range(20):
        lockout.fail(f"name-{number}", "a1")
    assert lockout.seconds_left("not-tried-yet", "a1") > 0
    assert lockout.seconds_left("not-tried-yet", "a2") == 0


def test_many_names_and_addresses_lock_all_logins_in_bounded_memory(clock: Clock) -> None:
    """Breaks if an attacker with many addresses is not limited, or fills the memory."""
    lockout = Lockout(clock)
    for number in range(10_000):
        lockout.fail(f"name-{number}", f"address-{number}")
    assert lockout.seconds_left("not-tried-yet", "new") == 900
    assert len(lockout._failures) <= 2 * BUCKETS + 1
    clock.now += 901
    assert lockout.seconds_left("not-tried-yet", "new") == 0


def test_a_success_forgets_the_failures_of_the_name_only(clock: Clock) -> None:
    """Breaks if a known password resets the count of the address from which others are guessed."""
    lockout = Lockout(clock)
    fail(lockout, 19)
    lockout.succeed("ada")
    assert lockout.seconds_left("ada", "a1") == 0
    lockout.fail("bob", "a1")
    assert lockout.seconds_left("ada", "a1") > 0
