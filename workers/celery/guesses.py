"""Slows down guesses at Flower's password."""

from collections import OrderedDict

FIRST_PAUSE, MAX_PAUSE = 0.1, 2.0  # seconds between two guesses from one address, doubled after each wrong one
MAX_WAIT = 10.0  # of one request for its turn
FORGET_SECONDS = 600.0
MAX_ADDRESSES = 1000


class Guesses:
    """Slows down guesses at the password, by address. Every attempt waits for its turn *before* it is compared.

    If only wrong passwords waited, a client could take every late answer for a wrong guess, and send many guesses in
    parallel. An address without wrong guesses never waits.
    """

    def __init__(self) -> None:
        # By address: the number of wrong guesses, and the time of the next turn.
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def wait(self, address: str, now: float) -> float | None:
        """Reserves the next turn of the address. Returns the seconds until then; None if that is over MAX_WAIT."""
        count, turn = self._wrong.get(address, (0, 0.0))
        if not count or now - turn > FORGET_SECONDS:
            self._wrong.pop(address, None)
            return 0.0
        turn = max(turn, now)
        if turn - now > MAX_WAIT:
            return None
        self._wrong[address] = (count, turn + self._pause(count))
        return turn - now

    def record(self, address: str, now: float, *, is_right: bool) -> None:
        """Doubles the pause after a wrong password. The right password ends the pauses of its address."""
        count, turn = self._wrong.pop(address, (0, 0.0))
        if is_right:
            return
        self._wrong[address] = (count + 1, max(turn, now + self._pause(count + 1)))
        if len(self._wrong) > MAX_ADDRESSES:
            self._wrong.popitem(last=False)

    @staticmethod
    def _pause(count: int) -> float:
        return min(FIRST_PAUSE * 2.0 ** min(count - 1, 20), MAX_PAUSE)
