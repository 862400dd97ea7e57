"""Which keys of the job's store nobody will ask for any more, and how that is known. Pure.

A run of months is sent commands all day, and the store keeps every key in the memory of the process that serves it. A
key that is taken away too early is waited for in vain, or, worse, decided a second time. So whoever takes one away has
read a proof that all who may ask for it are past that:

    `a h l r`/N/R  only rank 0 reads them, and it is past them when it proposes again: rank R takes away its own once it
                   has followed a later proposal. (Its training thread may still look for `h` then, where its leader was
                   cut off: it goes by `m`, which is decided before R is past N.)
    `p d m c v`/N  every rank reads them, and is past them when it answers a later proposal: rank 0 takes them away once
                   each rank has

An answer is written by a rank's control thread, which follows one proposal after another. What other threads of that
rank still have to ask, they ask under the lock under which it writes, and only if it is not past it (control.py).
"""


def of_rank(number: int, rank: int) -> list[str]:
    """What one rank wrote for rank 0 about a proposal; some of these keys may not exist."""
    return [f"{kind}/{number}/{rank}" for kind in "ahlr"]


def of_all(number: int) -> list[str]:
    """What every rank reads of a proposal; some of these keys may not exist."""
    return [f"{kind}/{number}" for kind in "pdmcv"]


class Spent:
    """Proposals whose keys are to be taken away, oldest first, until that has worked."""

    def __init__(self) -> None:
        self._newest = 0  # up to this one everything is past
        self._next = 1  # the oldest whose keys may still be there

    def past(self, number: int) -> None:
        """Proof was read that nobody asks for anything of this proposal or of an earlier one."""
        self._newest = max(self._newest, number)

    def due(self) -> range:
        return range(self._next, self._newest + 1)

    def gone(self, number: int) -> None:
        """Its keys are taken away, and those of all before it."""
        self._next = number + 1
