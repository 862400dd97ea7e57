"""Names of metrics: which are shown and as what, and what is told of odd ones. Pure."""

NAMES_LIMIT = 2_000
NAME_LENGTH = 200
_SAID_LIMIT = 50
# What a script may call its own count of steps; that of the run is counted by `step_done`.
_COUNTERS = frozenset({"step", "steps", "global_step", "iter", "iteration", "it"})


class Names:
    """From the name that a script gave to the one that is shown. Says once of each name what is wrong with it.

    `complaints` are of what is not shown as it was meant; `remarks` of what an operator may wonder about.
    """

    def __init__(self) -> None:
        self.shown: dict[str, str | None] = {}  # by the script's name; None: it is left out
        self.counters: set[str] = set()
        self.complaints: list[str] = []
        self.remarks: list[str] = []
        self._holders: dict[str, str] = {}  # the script's name, by the shown one
        self._said: set[str] = set()
        self._over_limit = False

    def admit(self, name: str) -> str | None:
        """The name under which a metric is shown, or None: there is nothing to show, or there are too many."""
        if len(self.shown) >= NAMES_LIMIT:  # asked first: such names come anew at every step, thousands of them
            if not self._over_limit:
                self._over_limit = True
                self.complaints.append(
                    f"more than {NAMES_LIMIT} metric names: further ones, from {_printable(name)!r} on, are not "
                    "recorded. Names should not contain the step or a sample's number"
                )
            return None
        shown = _printable(name)
        found = self.shown[name] = self._place(name, shown)
        if found is not None and found.rpartition("/")[2] in _COUNTERS:
            self.counters.add(found)
        return found

    def complain(self, about: str, text: str) -> None:
        """Say it, unless something was said of that name."""
        if about not in self._said and len(self._said) < _SAID_LIMIT:
            self._said.add(about)
            self.complaints.append(text)

    def remark(self, about: str, text: str) -> None:
        """The same for what is only worth knowing."""
        if about not in self._said and len(self._said) < _SAID_LIMIT:
            self._said.add(about)
            self.remarks.append(text)

    def _place(self, name: str, shown: str) -> str | None:
        if not shown:
            self.complain(name, f"metric {name[:NAME_LENGTH]!r} has no character that can be shown: it is left out")
            return None
        holder = self._holders.get(shown)
        if holder is not None and shown != name:
            self._refuse(name, shown, holder)
            return None
        if holder is not None:
            # The name as it stands is the better claim: what was shown in its place is from here on left out.
            self._refuse(holder, shown, name)
            self.shown[holder] = None
        elif shown != name:
            self.complain(
                name,
                f"metric {name[: 2 * NAME_LENGTH]!r} is shown as {shown!r}: names are up to {NAME_LENGTH} printable "
                "characters",
            )
        self._holders[shown] = name
        return shown

    def _refuse(self, name: str, shown: str, holder: str) -> None:
        self.complain(
            f"{name} (refused)",
            f"metric {name[: 2 * NAME_LENGTH]!r} is left out: without what cannot be shown it is {shown!r}, and so is "
            f"{holder[: 2 * NAME_LENGTH]!r}. Give it a name of its own, of up to {NAME_LENGTH} printable characters",
        )


def _printable(name: str) -> str:
    return "".join(c for c in name if c.isprintable())[:NAME_LENGTH]
