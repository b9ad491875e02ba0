"""What a process has loaded when it is ready stays as long as it does: the garbage collector need not walk over it."""

import gc


def keep() -> None:
    """Leaves all that is there out of later collections.

    A process of ours holds a quarter of a million objects of its libraries, and makes as many each second that soon
    go: a fifth of the endpoint's Python for a request went into looking at the former (91 us, 73 without).
    """
    gc.collect()
    gc.freeze()
