"""How many metrics a run may have over all its attempts: what is recorded is told to everybody who joins."""

from collections.abc import Iterable

import msgspec

from trainctl.wire.messages import Rows

NAMES_LIMIT = 4000
NAMES_BYTES = 512 * 1024


class NameLimit:
    """Lets the first so many names through, whatever attempt they are of. A rank limits only its own."""

    def __init__(self, known: Iterable[str]) -> None:
        self._known = set(known)
        self._bytes = sum(len(name.encode()) for name in self._known)
        self.refused = set[str]()

    def admitted(self, rows: Rows) -> Rows:
        """These rows without the columns whose names are too many."""
        fresh = [column.name for column in rows.columns if column.name not in self._known]
        if not fresh:
            return rows
        for name in fresh:
            size = len(name.encode())
            if len(self._known) < NAMES_LIMIT and self._bytes + size <= NAMES_BYTES:
                self._known.add(name)
                self._bytes += size
            elif len(self.refused) < NAMES_LIMIT:
                self.refused.add(name)
        kept = [column for column in rows.columns if column.name in self._known]
        return rows if len(kept) == len(rows.columns) else msgspec.structs.replace(rows, columns=kept)

    def complaint(self) -> str | None:
        """What to tell of names that were refused, once; None where there is nothing to tell."""
        if not self.refused:
            return None
        return (
            f"the run has {len(self._known)} metric names over all attempts, as many as are recorded: further ones "
            f"are not, like {min(self.refused)[:80]!r}. Names should not contain the attempt, the step or a sample's "
            "number"
        )
