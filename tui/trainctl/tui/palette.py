"""The command palette: every command of the registry by name, and every look."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from textual.command import DiscoveryHit, Hit, Hits, Provider

from trainctl.tui.keyline import SCREENS
from trainctl.wire.commands import REGISTRY

if TYPE_CHECKING:
    from trainctl.tui.app import CockpitApp


class CommandsAndLooks(Provider):
    """Commands that are off are listed too, with the reason: a list that changes is hard to learn."""

    def _entries(self) -> list[tuple[str, str, Callable[[], None]]]:
        app = cast("CockpitApp", self.app)
        entries: list[tuple[str, str, Callable[[], None]]] = []
        for name, spec in REGISTRY.items():
            why = app.commander.why_off(name)
            words = f"off: {why}" if why else spec.summary
            entries.append((name, f"{words}  ({spec.key})" if spec.key else words, partial(app.press, name)))
        for key, name in SCREENS:
            entries.append((f"show {name}", f"screen {key}", partial(app.look_at, name)))
        entries.append(("freeze the view", "training goes on  (space)", app.freeze))
        entries.append(("leave", "leave the cockpit; training goes on  (q)", app.action_leave))
        return entries

    async def discover(self) -> Hits:
        for name, words, act in self._entries():
            yield DiscoveryHit(name, act, help=words)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for name, words, act in self._entries():
            score = matcher.match(f"{name} {words}")
            if score > 0:
                yield Hit(score, matcher.highlight(name), act, help=words)
