"""The dialog of a rollback: choose a checkpoint, see what is lost, confirm."""

from collections.abc import Iterable, Sequence

from textual.widget import Widget
from textual.widgets import Static

from trainctl.client.errors import ClientError
from trainctl.client.rollback_plan import LostWork, lost_work, why_not
from trainctl.client.rollback_rate import RateThen, lr_after, rate_then
from trainctl.client.session import Session
from trainctl.tui import figures
from trainctl.tui.dialog import Dialog, NumberField, Wish, field_row
from trainctl.tui.dialogs import table_rows
from trainctl.tui.table import TableView
from trainctl.tui.tables import checkpoints_table
from trainctl.tui.theme import Look
from trainctl.wire.commands import Rollback, check
from trainctl.wire.manifest import resized_words
from trainctl.wire.messages import CheckpointInfo


class RollbackDialog(Dialog):
    """Choose a checkpoint, see the plan, confirm."""

    title_text = "Roll back"
    verb = "roll back"
    AUTO_FOCUS = "TableView"
    DEFAULT_CSS = """
    RollbackDialog > #box { width: 110; }
    RollbackDialog TableView { height: 10; margin-bottom: 1; }
    RollbackDialog #plan { margin-bottom: 1; }
    RollbackDialog.-short TableView, RollbackDialog.-short #plan { margin-bottom: 0; }
    """

    def __init__(self, session: Session, look: Look, checkpoints: Sequence[CheckpointInfo], start: str = "") -> None:
        super().__init__(session.model, look)
        self.session = session
        self.checkpoints = {info.id: info for info in checkpoints}
        self.start = start
        # By checkpoint, as it was when it was first looked at.
        self._lost: dict[str, LostWork] = {}
        self._rate_then: dict[str, RateThen] = {}

    def body(self) -> Iterable[Widget]:
        yield TableView(self.look, id="choose")
        yield Static("", id="plan", classes="words", markup=False)
        yield field_row(
            "skip batches of data", NumberField("0", id="skip"), "learning rate ×", NumberField("1", id="lr")
        )

    def on_mount(self) -> None:
        view = self.query_one("#choose", TableView)
        table = checkpoints_table(self.model, self.look.symbols, list(self.checkpoints.values()))
        keys = [row.key for row in table.rows]
        good = [key for key in keys if self.checkpoints[key].verified is not False]
        good.sort(key=lambda key: self.checkpoints[key].abandoned)  # stable: the newest of the live branch first
        wanted = self.start if self.start in keys else next(iter(good), None)
        view.styles.height = min(table_rows(self, 11), max(3, len(table.rows) + 1))
        view.put(table)
        if wanted is not None:
            view.cursor = keys.index(wanted)
            view.draw()
        self._plan()

    def on_table_view_moved(self) -> None:
        self._plan()

    def on_input_changed(self) -> None:
        self._plan()

    def on_table_view_chosen(self) -> None:
        """Enter on a checkpoint goes on to the fields; it never rolls back."""
        self.query_one("#skip", NumberField).focus()

    def _chosen(self) -> CheckpointInfo:
        key = self.query_one("#choose", TableView).key
        if key is None:
            raise ValueError("there is no checkpoint to go back to: C saves one")
        chosen = self.checkpoints[key]
        if chosen.verified is False:
            raise ValueError(f"checkpoint {chosen.step:,} is damaged: choose another one")
        return chosen

    def _numbers(self) -> tuple[int, float]:
        scale = self.query_one("#lr", NumberField).number()
        return self.query_one("#skip", NumberField).count() or 0, 1.0 if scale is None else scale

    def _plan(self) -> None:
        self.tell("")
        try:
            chosen, (skip, scale) = self._chosen(), self._numbers()
        except ValueError as error:
            self.query_one("#plan", Static).update("")
            self.tell(str(error))
            return
        action = self.wish().action
        if (problem := check(action) or why_not(action, self.model)) is not None:
            self.tell(problem)
        if chosen.id not in self._lost:
            self.run_worker(self._look_up(chosen), group="lost", exclusive=True)
        parts = [self._lost_words(chosen, self._lost.get(chosen.id))]
        parts += [f"{skip:,} batches skipped"] if skip else []
        parts += self._lr_words(chosen, scale)
        ranks = self.model.info.world_size if self.model.info else 0
        parts += [other] if (other := resized_words(chosen.world_size, ranks)) else []
        parts += ["its hashes are checked first"] if chosen.verified is None else []
        self.query_one("#plan", Static).update(f"{self.look.symbols.rollback} " + " · ".join(parts))

    async def _look_up(self, chosen: CheckpointInfo) -> None:
        """How long the steps took that would be lost, and the rate then: the run's history knows."""
        try:
            self._rate_then[chosen.id] = await rate_then(self.session, chosen)
            self._lost[chosen.id] = await lost_work(self.session, chosen, list(self.checkpoints.values()))
        except ClientError:
            since = max(0, self.model.state.step - chosen.step) if self.model.state and not chosen.abandoned else None
            self._lost[chosen.id] = LostWork(steps=since)
        self._plan()

    def _lost_words(self, chosen: CheckpointInfo, lost: LostWork | None) -> str:
        step = self.model.state.step if self.model.state else chosen.step
        if lost is not None:
            steps, hours = lost.steps, lost.hours_text(self.model.ranks.values())
        else:
            steps = None if chosen.abandoned else max(0, step - chosen.step)
            hours = self.look.symbols.ellipsis
        words = f"{steps:,} steps are lost" if steps is not None else "how many steps are lost is not known"
        return f"back from step {step:,} to {chosen.step:,}: {words}, {hours}"

    def _lr_words(self, chosen: CheckpointInfo, scale: float) -> list[str]:
        lr = self.model.state.lr if self.model.state else None
        factor = f" {self.look.symbols.times}{scale:g}" if scale != 1 else ""
        if lr is None or lr.effective is None:
            return [f"lr{factor}"] if factor else []
        then = self._rate_then.get(chosen.id, RateThen())
        after = lr_after(lr, then, lr_scale=None if scale == 1 else scale)
        arrow = self.look.symbols.arrow
        return [f"lr{factor}: {figures.learning_rate(lr.effective)} {arrow} {figures.learning_rate(after)}"]

    def wish(self) -> Wish:
        chosen, (skip, scale) = self._chosen(), self._numbers()
        return Wish(action=Rollback(target=chosen.id, skip_batches=skip, lr_scale=None if scale == 1 else scale))
