"""From a key to a command: why it is off, which dialog it opens, and what became of it."""

import itertools
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from trainctl.client.errors import ClientError
from trainctl.client.lines import arguments
from trainctl.client.session import Session
from trainctl.tui.dialog import Wish
from trainctl.tui.dialogs import SIMPLE_DIALOGS, RemoveDialog, TunablesDialog
from trainctl.tui.event_lines import Progress
from trainctl.tui.keyline import ACTING, off_reason
from trainctl.tui.rollback_dialog import RollbackDialog
from trainctl.tui.theme import Look
from trainctl.tui.tones import Tone
from trainctl.wire.commands import (
    REGISTRY,
    Action,
    Cancel,
    CheckpointPin,
    CheckpointUnpin,
    Evaluate,
    LrRelease,
    Pause,
    Resume,
    args_of,
    spec_of,
)

if TYPE_CHECKING:
    from textual.app import App

_AT_ONCE: dict[str, Callable[[], Action]] = {
    "pause": Pause,
    "resume": Resume,
    "eval": Evaluate,
    "lr release": LrRelease,
}


class Commander:
    """Acts on one run for one app. `changed` is called whenever the event line has something new."""

    def __init__(
        self,
        app: "App[str]",
        session: Session,
        look: Look,
        progress: Progress,
        *,
        read_only: bool,
        changed: Callable[[], None],
    ) -> None:
        self.app = app
        self.session = session
        self.model = session.model
        self.look = look
        self.progress = progress
        self.read_only = read_only
        self.changed = changed
        self._numbers = itertools.count(1)

    def why_off(self, command: str) -> str | None:
        """Why a command cannot be given now, in words for the operator; None when it can."""
        if self.read_only:
            return "this cockpit was opened read-only; `trainctl tui` without --read-only acts"
        if self.model.link == "recorded":
            return "this is a recording: there is nothing left to act on"
        if self.model.ended and self.model.state is not None:
            return f"the run is {self.model.state.state}: there is nothing left to act on"
        reason = off_reason(command, self.model.info.capabilities if self.model.info else {})
        return f"this run cannot {command}: {reason}" if reason else None

    def off(self) -> dict[str, str]:
        """Reasons by command, for the keys of the footer."""
        return {command: why for _, command, _, _ in ACTING if (why := self.why_off(command)) is not None}

    def press(self, command: str, *, target: str = "") -> None:
        """A key or the palette asks for a command. `target` is the checkpoint chosen on its screen."""
        if command == "pause" and self.model.state is not None and self.model.state.state == "paused":
            command = "resume"
        if (why := self.why_off(command)) is not None:
            self.say(f"{command}: {why}", Tone.WARNING)
            return
        if command in _AT_ONCE:
            self.start(Wish(action=_AT_ONCE[command]()))
        elif command in SIMPLE_DIALOGS:
            self.app.push_screen(SIMPLE_DIALOGS[command](self.model, self.look), self.start)
        elif command == "rollback":
            self.app.run_worker(self._open_rollback(target), group="dialog", exclusive=True)
        elif command == "set":
            self.app.run_worker(self._open_tunables(), group="dialog", exclusive=True)
        elif command == "cancel":
            self._cancel_newest()
        elif not target:  # what is left is about one checkpoint
            self.say("choose a checkpoint first: 4 lists them, K keeps the chosen one", Tone.WARNING)
        elif command == "checkpoint rm":
            self.app.push_screen(RemoveDialog(self.model, self.look, target), self.start)
        else:
            kind = CheckpointPin if command == "checkpoint pin" else CheckpointUnpin
            self.start(Wish(action=kind(checkpoint=target)))

    def toggle_pin(self, checkpoint: str) -> None:
        """Keep a checkpoint, or leave it to the retention again."""
        pinned = any(info.pinned for info in self.model.checkpoints if info.id == checkpoint)
        self.press("checkpoint unpin" if pinned else "checkpoint pin", target=checkpoint)

    def _cancel_newest(self) -> None:
        waiting = [update.id for update in self.model.commands.values() if update.state == "accepted"]
        if waiting:
            self.start(Wish(action=Cancel(command=waiting[-1])))
        else:
            self.say("cancel: no command is waiting", Tone.WARNING)

    async def _open_rollback(self, target: str) -> None:
        found = self.model.checkpoints
        try:
            found = (await self.session.checkpoints()).checkpoints
        except ClientError as error:
            self.say(f"the checkpoints could not be listed anew: {error.message}", Tone.WARNING)
        self.app.push_screen(RollbackDialog(self.session, self.look, found, target), self.start)

    async def _open_tunables(self) -> None:
        try:
            tunables = await self.session.tunables()
        except ClientError as error:
            self.say(f"tunables: {error.message}. {error.hint}", Tone.ERROR)
            return
        self.app.push_screen(TunablesDialog(self.model, self.look, tunables), self.start)

    def verify(self, checkpoint: str) -> None:
        """Hash a checkpoint's files; looks only."""
        self.app.run_worker(self._verify(checkpoint), group="verify")

    async def _verify(self, checkpoint: str) -> None:
        self.say(f"{checkpoint}: hashing its files", Tone.TEXT)
        try:
            answer = await self.session.verify(checkpoint)
        except ClientError as error:
            self.say(f"{checkpoint}: {error.message}. {error.hint}", Tone.ERROR)
            return
        self.say(f"{checkpoint}: {answer.text}", Tone.GOOD if answer.ok else Tone.ERROR)

    def start(self, wish: Wish | None) -> None:
        """Send what a dialog asked for; None is "cancelled"."""
        if wish is not None:
            self.app.run_worker(self._carry(wish), group="commands")

    async def _carry(self, wish: Wish) -> None:
        key, name = f"sent-{next(self._numbers)}", spec_of(wish.action).name
        self.progress.sending(key, f"{name} {arguments(args_of(wish.action))}".strip())
        self.changed()
        updates = self.session.do(wish.action, revert_after=wish.revert_after, unless=wish.unless)
        try:
            async with aclosing(updates) as stream:
                async for update in stream:
                    self.progress.update(key, update, time.monotonic())
                    self.changed()
        except ClientError as error:
            words = f"{name}: {error.message}" + (f". {error.hint}" if error.hint else "")
            self.progress.say(key, words, Tone.ERROR, time.monotonic())
        self.changed()

    def say(self, text: str, tone: Tone) -> None:
        """A line of the cockpit's own on the event line."""
        self.progress.say("cockpit", text, tone, time.monotonic())
        self.changed()


PALETTE: tuple[tuple[str, str], ...] = tuple((name, spec.summary) for name, spec in REGISTRY.items())
