"""The cockpit as a program: opens a run, follows it, and puts the terminal back however it ends."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.screen import Screen

from trainctl.client.errors import ClientError
from trainctl.client.session import Session, open_session
from trainctl.tui.commander import Commander
from trainctl.tui.dialogs import LeaveDialog
from trainctl.tui.event_lines import Progress
from trainctl.tui.feed import Feed, samples_of
from trainctl.tui.palette import CommandsAndLooks
from trainctl.tui.screen import CockpitScreen, Parts
from trainctl.tui.theme import ANSI_THEME, DARK, Look, look_for
from trainctl.tui.tones import Tone
from trainctl.wire.commands import FINAL_COMMAND_STATES
from trainctl.wire.messages import Beat, CommandUpdate, Envelope, RolledBack, Rows, Snapshot

_LEAST_POINTS = 400
_COMPACT_AT = 60_000  # samples of one curve after which rollups are fetched in their place
_BREATHE_EVERY = 50  # messages taken in a row before keys and drawing get their turn
_BRANCHES = 8
_RETRY_HISTORY_S = 3.0


class CockpitApp(App[str]):
    """One run on the screen. Returns how it was left: `quit`, `go-on` or `stop`."""

    TITLE = "trainctl"
    COMMANDS: ClassVar = {CommandsAndLooks}
    COMMAND_PALETTE_BINDING: ClassVar[str] = "ctrl+p"
    ENABLE_COMMAND_PALETTE = True
    CSS = """
    * { scrollbar-size: 1 1; }
    CommandPalette > Vertical { max-width: 90; }
    CommandPalette SearchIcon { display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "leave", "leave", show=False),
        Binding("ctrl+c,ctrl+q", "leave", "leave", show=False, priority=True),
    ]

    def __init__(
        self, session: Session, *, owned: bool = False, read_only: bool = False, look: Look | None = None
    ) -> None:
        # The toolkit turns colours grey for NO_COLOR; with ansi_color it leaves them out, which is what is meant.
        super().__init__(ansi_color=True if "NO_COLOR" in os.environ else None)
        self.session = session
        self.owned = owned
        self.feed = Feed()
        self.look = look or look_for(color_system=self.console.color_system, no_color=self.no_color)
        self.progress = Progress(symbols=self.look.symbols)
        self.commander = Commander(self, session, self.look, self.progress, read_only=read_only, changed=self._news)
        self.first_picture = asyncio.Event()
        self.cockpit = CockpitScreen(
            Parts(
                model=session.model,
                feed=self.feed,
                look=self.look,
                progress=self.progress,
                commander=self.commander,
                ready=self._start,
            )
        )
        self._history_again = False
        self._last_word = ""

    def get_default_screen(self) -> Screen[object]:
        return self.cockpit  # type: ignore[return-value]  # a screen without a result

    def on_mount(self) -> None:
        self.register_theme(DARK)
        self.theme = ANSI_THEME if self.look.ansi else DARK.name

    def _start(self) -> None:
        self.run_worker(self._follow(), group="follow")

    # --- taking in

    async def _follow(self) -> None:
        taken = 0
        try:
            async with contextlib.aclosing(self.session.follow()) as items:
                async for item in items:
                    if self._take(item):
                        self._news()
                    taken += 1
                    if taken % _BREATHE_EVERY == 0:
                        await asyncio.sleep(0)
        except ClientError as error:
            self.commander.say(f"{error.message}. {error.hint}", Tone.ERROR)

    def _take(self, item: Snapshot | Envelope | Beat | None) -> bool:
        """Feed the curves; true when the screen should say so at once."""
        match item:
            case Snapshot():
                self.load_history()
                return True
            case Envelope(body=Rows() as rows):
                self.feed.append(rows)
                if self.feed.unsure or self.feed.size > _COMPACT_AT:
                    self.load_history()
                return False
            case Envelope(body=RolledBack() as event):
                self.feed.roll_back(event)
                self.load_history()
                return True
            case Envelope(body=CommandUpdate() as update) if update.state in FINAL_COMMAND_STATES:
                self.progress.logged(update.id)
                return True
            case Envelope(stream="events"):
                return True
            case Beat():
                return self._word_changed()
            case _:
                return item is None

    def _word_changed(self) -> bool:
        state = self.session.model.state
        word = state.state if state else ""
        changed, self._last_word = word != self._last_word, word
        return changed

    def load_history(self) -> None:
        """Ask for the past anew, as soon as an answer that is on its way has come."""
        if self.feed.loading:
            self._history_again = True
            return
        self.feed.begin_load()
        self.run_worker(self._load_history(), group="history")

    async def _load_history(self) -> None:
        model = self.session.model
        points = max(_LEAST_POINTS, 4 * self.size.width)
        try:
            history = await self.session.history(sorted(model.metrics), points=points) if model.metrics else {}
            self.feed.load(history)
            await self._load_branches(points // 2)
        except ClientError as error:
            self.feed.give_up()
            self.commander.say(f"the past of the curves did not come: {error.message}", Tone.WARNING)
            self.set_timer(_RETRY_HISTORY_S, self.load_history)
        if self._history_again:
            self._history_again = False
            self.load_history()
            return
        if self.is_running:
            self.cockpit.redraw()
            self.first_picture.set()

    async def _load_branches(self, points: int) -> None:
        """What earlier rollbacks left behind."""
        held = {branch.incarnation for branch in self.feed.branches}
        found = [event for event in await self.session.events(kinds=["rollback"]) if isinstance(event, RolledBack)]
        names = {metric for plot in self.cockpit.run_view.plots[:4] for metric in plot.metrics}
        wanted = sorted(names & set(self.session.model.metrics))
        for event in found[-_BRANCHES:]:
            if event.from_incarnation in held or not wanted:
                continue
            left = await self.session.history(
                wanted,
                from_step=event.step,
                to_step=event.from_step,
                points=points,
                incarnation=event.from_incarnation,
            )
            self.feed.keep_branch(event, {name: samples_of(curve) for name, curve in left.items() if len(curve)})

    # --- showing and acting

    def _news(self) -> None:
        if self.is_running:
            self.cockpit.news()

    def press(self, command: str) -> None:
        """Act as the key of a command would."""
        self.cockpit.action_act(command)

    def look_at(self, name: str) -> None:
        """Show one of the screens."""
        self.cockpit.action_look(name)

    def freeze(self) -> None:
        """Hold the picture still, or let it go on."""
        self.cockpit.action_freeze()

    def action_leave(self) -> None:
        """Leave; ask first where the run was started with the cockpit and still goes."""
        if isinstance(self.screen, LeaveDialog):
            self.exit("go-on")  # Ctrl+C at the question: the harmless answer
        elif self.owned and not self.session.model.ended:
            self.push_screen(LeaveDialog(self.session.model.name), self._left)
        else:
            self.exit("quit")

    def _left(self, answer: str | None) -> None:
        if answer is not None:
            self.exit(answer)


@contextlib.contextmanager
def _leaving_on_signals(app: CockpitApp) -> Iterator[None]:
    """Leave in order on SIGTERM and SIGHUP: the toolkit would leave the terminal raw."""
    loop = asyncio.get_running_loop()
    handled = (signal.SIGTERM, signal.SIGHUP)
    for number in handled:
        loop.add_signal_handler(number, app.exit, "quit")
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


async def _run(ref: str | None, *, owned: bool, read_only: bool, server_key: str | None) -> str:
    session = await open_session(ref, server_key=server_key)
    try:
        app = CockpitApp(session, owned=owned, read_only=read_only)
        with _leaving_on_signals(app):
            return await app.run_async() or "quit"
    finally:
        await session.close()


def run_cockpit(ref: str | None, *, owned: bool = False, read_only: bool = False, server_key: str | None = None) -> str:
    """Show a run until the user leaves.

    `owned`: the run was started together with the cockpit, so leaving asks whether it goes on. Returns `quit`,
    `go-on` or `stop`; carrying out `stop` is the caller's. Raises `client.errors.ClientError` before the screen
    starts, when there is no such run or nobody answers.
    """
    return asyncio.run(_run(ref, owned=owned, read_only=read_only, server_key=server_key))
