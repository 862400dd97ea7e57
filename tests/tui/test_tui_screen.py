"""The cockpit in small and large terminals, driven by keys: what it shows, what it opens, what it sends."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec
import numpy as np
import pytest
from scripted_session import (
    ScriptedSession,
    checkpoints,
    curves,
    node_readings,
    rank_figures,
    rows,
    run_info,
    run_state,
    snapshot,
)
from textual.pilot import Pilot
from textual.widgets import Static

from trainctl.tui.app import CockpitApp
from trainctl.tui.dialogs import LeaveDialog, LrDialog, RemoveDialog, StopDialog, TunablesDialog
from trainctl.tui.figures import learning_rate
from trainctl.tui.help import HelpScreen
from trainctl.tui.rollback_dialog import RollbackDialog
from trainctl.tui.theme import look_for
from trainctl.wire.commands import (
    CheckpointRemove,
    CheckpointSave,
    Evaluate,
    LrScale,
    LrSet,
    Pause,
    Resume,
    Rollback,
    SetTunable,
    Stop,
)
from trainctl.wire.messages import LrState, Ranks

SIZES = [(40, 12), (60, 15), (80, 24), (100, 30), (120, 36), (180, 50), (200, 60)]
LOOK = look_for(color_system="truecolor", no_color=False, glyphs="braille")

Scenario = Callable[["Cockpit"], Awaitable[None]]


class Cockpit:
    """The app under test, with what a person would see and do."""

    def __init__(self, app: CockpitApp, session: ScriptedSession, pilot: Pilot[str]) -> None:
        self.app, self.session, self.pilot = app, session, pilot

    def text(self) -> str:
        return "\n".join(strip.text for strip in self.app.screen._compositor.render_strips())

    async def press(self, *keys: str) -> str:
        await self.pilot.press(*keys)
        await self.pilot.pause()
        return self.text()

    async def until(self, words: str, seconds: float = 5.0) -> str:
        """Wait until the screen says something."""
        async with asyncio.timeout(seconds):
            while words not in (text := self.text()):
                await self.pilot.pause(0.02)
        return text

    @property
    def sent(self) -> list[object]:
        return [action for action, _ in self.session.sent]


def drive(
    scenario: Scenario,
    size: tuple[int, int] = (120, 36),
    *,
    session: ScriptedSession | None = None,
    owned: bool = False,
    read_only: bool = False,
) -> str | None:
    """Run a scenario against a cockpit; return how the cockpit was left."""

    async def body() -> str | None:
        script = session or ScriptedSession(snapshot())
        app = CockpitApp(script, owned=owned, read_only=read_only, look=LOOK)
        async with app.run_test(size=size) as pilot:
            await asyncio.wait_for(app.first_picture.wait(), 10)
            await pilot.pause()
            await scenario(Cockpit(app, script, pilot))
        return app.return_value

    return asyncio.run(body())


# --- one glance


@pytest.mark.parametrize("size", SIZES)
def test_state_step_and_loss_are_there_without_a_key(size: tuple[int, int]) -> None:
    async def scenario(cockpit: Cockpit) -> None:
        text = cockpit.text()
        assert "● RUNNING" in text
        assert "5,000" in text
        assert "loss 2." in text
        assert all(len(line) == size[0] for line in text.splitlines())
        if size[0] < 60:
            assert "enlarge to 60×15" in text
        else:
            assert "P pause" in text
            assert "ranks" in text
            assert "checkpoint step-00005000-2 verified" in text

    drive(scenario, size)


def test_the_four_charts_are_on_one_screen() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        for title in ("loss", "learning rate", "gradient norm", "tokens/s"):
            assert f" {title}" in cockpit.text()

    drive(scenario)


def test_tab_walks_through_the_charts_where_one_fits() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        titles = []
        for _ in range(4):
            text = await cockpit.press("tab")
            titles.append(next(line.split("  ")[0].strip() for line in text.splitlines() if "Tab next" in line))
        assert titles == ["learning rate", "gradient norm", "tokens/s", "loss"]

    drive(scenario, (80, 24))


def test_new_steps_arrive_on_the_screen() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        cockpit.session.say(rows(5001, {"loss": 1.2345}))
        await cockpit.until("1.234")
        await cockpit.until("5,001")

    drive(scenario)


def test_nan_is_news_and_not_a_gap() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        cockpit.session.say(rows(5001, {"loss": float("nan")}))
        await cockpit.until("loss NaN at 5,001")
        await cockpit.until("NaN or inf in one place")
        assert "✖" in cockpit.text()

    drive(scenario)


@pytest.mark.parametrize("size", [(80, 24), (120, 36)])
def test_paused_stale_and_lost_say_what_happened_and_what_to_do(size: tuple[int, int]) -> None:
    async def scenario(cockpit: Cockpit) -> None:
        cockpit.session.say(run_state(state="paused", by="mk"))
        text = await cockpit.until("PAUSED")
        assert "by mk" in text
        assert "held: 4 GPUs, 0.9 GPU-h, 72 of 80 GB each" in text, "paused for 840 s"
        assert "P resumes" in text
        cockpit.session.say(run_state(state="paused", by="mk", since=time.time() - 3600))
        await cockpit.until("held: 4 GPUs, 4.0 GPU-h")
        began = time.time() - 7200  # and there was an evaluation meanwhile
        cockpit.session.say(run_state(state="paused", by="mk", since=time.time(), paused_since=began))
        text = await cockpit.until("held: 4 GPUs, 8.0 GPU-h")
        assert "PAUSED 2h" in text
        cockpit.session.say(run_state(state="lost", reason="rank 3 on node-b died: SIGKILL"))
        text = await cockpit.until("✕ LOST")
        assert "rank 3 on node-b died: SIGKILL · last good checkpoint 5,000" in text

    drive(scenario, size)


def test_a_change_on_trial_is_counted_down_also_while_the_run_is_held() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        cockpit.session.say(run_state(revert_in={"c1": 42}))
        await cockpit.until("a change on trial: undone in 42 steps")
        cockpit.session.say(run_state(step=5041, revert_in={"c1": 1, "c2": 7}))
        await cockpit.until("2 changes on trial: the next undone in 1 step")
        cockpit.session.say(run_state(step=5041, state="paused", revert_in={"c2": 7}))
        await cockpit.until("undone in 7 steps")
        cockpit.session.say(run_state(step=5050))
        await cockpit.until("RUNNING")
        assert "on trial" not in cockpit.text()

    drive(scenario)


def test_a_rank_that_left_its_loop_is_not_merely_silent() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        ranks = [
            msgspec.structs.replace(found, state="left") if found.rank == 3 else found for found in rank_figures(4)
        ]
        cockpit.session.say(Ranks(incarnation=2, ranks=ranks))
        await cockpit.until("left its loop on node-b")

    drive(scenario)


def test_an_evaluation_says_how_far_it_is() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        ranks = [msgspec.structs.replace(found, eval_batch=120 + found.rank) for found in rank_figures(4)]
        cockpit.session.say(run_state(state="evaluating"))
        cockpit.session.say(Ranks(incarnation=2, ranks=ranks))
        await cockpit.until("EVALUATING")
        await cockpit.until("120 batches done")

    drive(scenario)


def test_silence_is_stale_and_training_may_well_go_on() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        cockpit.session.fall_silent(9)
        text = await cockpit.until("◌ STALE 9s")
        assert "no word from the hub; training may well go on" in text
        cockpit.session.fall_silent(20, "gone")
        await cockpit.until("rank 0 starts its hub again")

    drive(scenario)


def test_before_the_first_snapshot_there_is_a_frame() -> None:
    async def body() -> None:
        app = CockpitApp(ScriptedSession(), look=LOOK)
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.pause()
            text = "\n".join(strip.text for strip in app.screen._compositor.render_strips())
            assert "CONNECTING" in text
            assert "waiting for the first picture" in text

    asyncio.run(body())


def test_the_rank_that_the_others_wait_for_is_named() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        assert "rank 3 slow: data wait 41%  node-a" in cockpit.text() or "3 slow: data wait 41%" in cockpit.text()
        assert "throttled: thermal" in cockpit.text()

    many = snapshot(ranks=rank_figures(8, slow=3), nodes=node_readings(2, 4, hot=True))
    for size in ((80, 24), (120, 36), (200, 60)):
        drive(scenario, size, session=ScriptedSession(many))


def test_a_thousand_ranks_and_no_metrics_are_drawn_too() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        assert "1000 ranks" in cockpit.text()
        assert "nothing logged yet" in cockpit.text()

    empty = snapshot(ranks=rank_figures(1000), metrics={}, nodes=[], checkpoints=[], events=[])
    drive(scenario, (120, 36), session=ScriptedSession(empty, logged={"step": np.array([]), "time": np.array([])}))


# --- acting


def test_p_pauses_and_then_resumes() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("P")
        await cockpit.until("pause by mk: applied at step 5003 on 4 ranks")
        cockpit.session.say(run_state(state="paused", by="mk"))
        await cockpit.until("P resume")
        await cockpit.press("P")
        assert cockpit.sent == [Pause(), Resume()]

    drive(scenario)


def test_the_progress_of_a_command_stays_until_it_is_settled() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("E")
        await cockpit.until("eval by mk: accepted, waits for the next boundary")
        assert cockpit.sent == [Evaluate()]

    drive(scenario, session=ScriptedSession(snapshot(), outcomes=["accepted"]))


def test_the_learning_rate_dialog_previews_and_enter_applies_nothing() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        text = await cockpit.press("L")
        assert isinstance(cockpit.app.screen, LrDialog)
        assert "gpt-stdlib · applies on 4 ranks at the next boundary" in text
        text = await cockpit.press("backspace", "backspace", "backspace", "0", ".", "2", "5")
        assert "now 2.80e-4 → 1.40e-4 effective" in text
        await cockpit.press("enter", "enter", "enter", "enter", "enter")
        assert isinstance(cockpit.app.screen, LrDialog)
        assert cockpit.sent == []
        await cockpit.press("ctrl+y")
        await cockpit.until("lr scale 0.25")
        assert cockpit.sent == [LrScale(factor=0.25)]

    drive(scenario)


def test_a_learning_rate_can_be_pinned_and_undone_by_itself() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("L", "tab", "3", "e", "-", "4", "tab", "5", "0", "0", "tab", *"loss < 2.3", "ctrl+y")
        await cockpit.until("applied")
        assert cockpit.session.sent == [(LrSet(value=3e-4), {"revert_after": 500, "unless": "loss < 2.3"})]

    drive(scenario)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (["backspace", "backspace", "backspace", "-", "1"], "give a number above 0"),
        (["backspace", "backspace", "backspace"], "give a factor, or a value"),
        (["backspace", "backspace", "backspace", "e", "e"], "is not a number"),
        (["tab", "tab", "5", "tab", *"loss <"], "expected NAME OPERATOR VALUE"),
    ],
)
def test_what_cannot_be_meant_is_said_in_the_dialog(keys: list[str], problem: str) -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("L", *keys, "ctrl+y")
        assert isinstance(cockpit.app.screen, LrDialog)
        assert problem in cockpit.text()
        assert cockpit.sent == []

    drive(scenario)


def test_rollback_shows_its_plan_and_only_y_does_it() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("R")
        text = await cockpit.until("steps are lost")
        assert isinstance(cockpit.app.screen, RollbackDialog)
        await cockpit.press("down")
        assert "checkpoint 4,000 is damaged: choose another one" in cockpit.text()
        await cockpit.press("y")
        assert cockpit.sent == []
        await cockpit.press("down")
        text = await cockpit.until("back from step 5,000 to 3,000: 2,000 steps are lost")
        assert "verified" in text
        # 4 ranks × the 0.9 s that each of the 2,000 steps took
        await cockpit.until("2,000 steps are lost, 2.00 GPU-hours")
        scheduled = curves(5000)["lr_scheduled"][3000]
        plan = str(cockpit.app.screen.query_one("#plan", Static).render())
        assert f"lr: 2.80e-4 → {learning_rate(scheduled / 2)}" in plan
        await cockpit.press("enter", "backspace", "4", "0", "enter", "backspace", "0", ".", "5", "enter", "enter")
        assert "40 batches skipped" in cockpit.text()
        plan = str(cockpit.app.screen.query_one("#plan", Static).render())
        assert f"lr ×0.5: 2.80e-4 → {learning_rate(scheduled / 2)}" in plan
        assert cockpit.sent == []
        await cockpit.press("y")
        assert cockpit.sent == [Rollback(target="step-00003000-1", skip_batches=40, lr_scale=0.5)]

    drive(scenario)


def test_what_a_rollback_cannot_do_for_this_script_is_said_in_its_plan() -> None:
    info = run_info()
    info = msgspec.structs.replace(info, capabilities=info.capabilities | {"skip": "the script owns its data iterator"})

    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("R", "down", "down", "enter", "backspace", "4", "0")
        await cockpit.until("--skip-batches: the script owns its data iterator")

    drive(scenario, session=ScriptedSession(msgspec.structs.replace(snapshot(), info=info)))

    async def a_slip(cockpit: Cockpit) -> None:
        ranks = [msgspec.structs.replace(found, data_first=8, data_last=9) for found in rank_figures(4)]
        cockpit.session.say(Ranks(incarnation=2, ranks=ranks))
        await cockpit.press("R", "down", "down", "enter", "backspace", *"200001")
        await cockpit.until("to skip 200001 micro-batches is more than the whole run reads on a rank")

    drive(a_slip)


def test_a_rate_that_is_set_stays_over_a_rollback() -> None:
    pinned = LrState(scheduled=5.6e-4, effective=1e-5, rule="pin", value=1e-5)

    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("R", "down", "down")
        await cockpit.until("lr: 1.00e-5 → 1.00e-5")

    drive(scenario, session=ScriptedSession(snapshot(state=run_state(lr=pinned))))


def test_a_rollback_whose_cost_is_not_recorded_says_so_and_never_nothing() -> None:
    logged = curves(5000)
    del logged["step_time_s"]

    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("R", "down", "down")
        await cockpit.until("2,000 steps are lost, GPU-hours n/a")

    drive(scenario, session=ScriptedSession(snapshot(), logged=logged))


def test_stop_asks_and_enter_is_not_the_answer() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("S", "enter", "space")
        assert isinstance(cockpit.app.screen, StopDialog)
        await cockpit.press("escape")
        assert cockpit.sent == []
        await cockpit.press("S", "y")
        assert cockpit.sent == [Stop()]

    drive(scenario, (80, 24))


def test_a_checkpoint_does_no_harm_so_enter_saves_it() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("C")
        assert "Esc cancel    Enter save" in await cockpit.until("Esc c"), "and y is a letter of the note"
        await cockpit.press(*"before y", "enter")
        assert cockpit.sent == [CheckpointSave(note="before y")]

    drive(scenario)


def test_tunables_are_set_within_their_bounds() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("T")
        await cockpit.until("0.1 … 100")
        assert isinstance(cockpit.app.screen, TunablesDialog)
        await cockpit.press("enter", *"500", "enter", "ctrl+y")
        assert "clip takes 0.1 … 100" in cockpit.text()
        await cockpit.press("shift+tab", "5", "0", "ctrl+y")
        assert cockpit.sent == [SetTunable(name="clip", value=50.0)]

    drive(scenario)


def test_a_command_that_is_off_says_why() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("L")
        await cockpit.until("this run cannot lr scale: no optimizer was given to Run.attach")
        assert cockpit.sent == []

    info = run_info(capabilities={"lr": "no optimizer was given to Run.attach", "pause": True})
    drive(scenario, session=ScriptedSession(snapshot(info=info)))


@pytest.mark.parametrize("key", list("PLCRSTE"))
def test_read_only_refuses_politely(key: str) -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press(key)
        await cockpit.until("opened read-only")
        assert cockpit.sent == []

    drive(scenario, read_only=True)


def test_a_recording_says_so_and_has_nothing_to_act_on() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        assert "recorded" in cockpit.text()
        assert "FINISHED" in cockpit.text()
        await cockpit.press("P")
        await cockpit.until("this is a recording")

    ended = snapshot(state=run_state(state="finished"))
    drive(scenario, session=ScriptedSession(ended, link="recorded"))


@pytest.mark.parametrize("size", [(40, 12), (60, 15)])
@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("L", "Esc cancel  Ctrl+Y apply"),
        ("R", "Esc cancel  y roll back"),
        ("S", "Esc cancel  y stop"),
        ("C", "Esc cancel  Enter save"),
        ("T", "Esc cancel  Ctrl+Y set"),
        ("question_mark", "Esc close"),
    ],
)
def test_the_answers_of_a_dialog_are_in_sight_on_a_small_terminal(size: tuple[int, int], key: str, answer: str) -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press(key)
        assert answer in await cockpit.until("Esc c")
        await cockpit.press("tab", "tab", "tab", "ctrl+y" if key == "L" else "tab")
        if key == "L":
            assert cockpit.sent == [LrScale(factor=0.5)]
        else:
            assert answer in cockpit.text()

    drive(scenario, size, session=ScriptedSession(snapshot(checkpoints=checkpoints(20))))


def test_a_problem_is_in_sight_on_a_small_terminal_too() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("L", "tab", "tab", "tab", *"loss <", "ctrl+y")
        text = cockpit.text()
        assert "“unless” needs a number of" in text
        assert "Esc cancel  Ctrl+Y apply" in text

    drive(scenario, (40, 12))


@pytest.mark.parametrize("key", ["L", "S", "C"])
def test_on_a_held_run_a_command_applies_at_once(key: str) -> None:
    async def scenario(cockpit: Cockpit) -> None:
        text = await cockpit.press(key)
        assert "applies now, at step 2,844, while the run is held" in text
        assert "2,847" not in text
        cockpit.session.say(run_state(step=2844))
        await cockpit.until("at the next boundary (≈ step 2,847)")

    drive(scenario, session=ScriptedSession(snapshot(state=run_state(state="paused", step=2844))))


@pytest.mark.parametrize("at", ["scale", "set"])
def test_a_negative_learning_rate_is_no_preview_and_is_refused(at: str) -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("L", *(["tab"] if at == "set" else ["backspace"] * 3), "-", "1")
        text = await cockpit.until("cannot be applied")
        assert "2.80e-4 →" not in text
        await cockpit.press("y")
        assert isinstance(cockpit.app.screen, LrDialog)
        assert cockpit.sent == []

    drive(scenario)


def test_the_bounds_of_a_tunable_are_not_shown_as_its_new_value() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("T", "down")
        text = await cockpit.until("eval_every is 50 now, takes a whole number ≥ 1")
        assert "→ ≥" not in text

    drive(scenario)


# --- looking


@pytest.mark.parametrize(
    ("key", "words"),
    [("2", "step time"), ("3", "NVIDIA H100"), ("4", "✕ damaged"), ("5", "rolled back from step 3912")],
)
def test_the_number_keys_change_the_screen_and_esc_comes_back(key: str, words: str) -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press(key)
        text = await cockpit.until(words)
        assert "RUNNING" in text
        await cockpit.press("escape")
        await cockpit.until("gradient norm")

    drive(scenario)


def test_events_are_filtered_by_words() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("slash", *"checkpoint", "enter")
        text = await cockpit.until("step-00005000-2 verified")
        assert "lr scale" not in text
        await cockpit.press("escape")
        await cockpit.until("lr scale")

    drive(scenario)


def test_space_freezes_the_view_and_says_that_training_goes_on() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        text = await cockpit.press("space")
        assert "VIEW FROZEN" in text
        cockpit.session.say(rows(5077, {"loss": 9.876}))
        text = await cockpit.until("training goes on, now at step 5,077")
        assert "9.876" not in text
        await cockpit.press("space")
        await cockpit.until("9.876")

    drive(scenario)


def test_the_crosshair_reads_values_and_esc_puts_it_away() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("tab", "left", "left")
        await cockpit.until("train 2.")
        await cockpit.press("escape")
        assert "train 2." not in cockpit.text()

    drive(scenario)


def test_the_newest_steps_can_be_looked_at_alone_and_on_a_log_axis() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("tab", "plus", "plus", "y")
        text = cockpit.text()
        assert "last 1,250 steps" in text
        assert " log" in text

    drive(scenario)


def test_checkpoints_are_verified_and_pinned_from_their_screen() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("4", "v")
        await cockpit.until("have the hashes of the manifest")
        await cockpit.press("K")
        assert cockpit.session.asked[-1] == "verify step-00005000-1"
        assert [type(action).__name__ for action in cockpit.sent] == ["CheckpointPin"]

    drive(scenario, session=ScriptedSession(snapshot(checkpoints=checkpoints())))


def test_a_checkpoint_is_deleted_from_the_palette_and_only_after_a_yes() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        cockpit.app.commander.press("checkpoint rm")
        await cockpit.until("choose a checkpoint first")
        assert not isinstance(cockpit.app.screen, RemoveDialog)
        cockpit.app.commander.press("checkpoint rm", target="step-00003000-1")
        await cockpit.until("deleted from the disk")
        await cockpit.press("enter")
        assert cockpit.sent == []
        await cockpit.press("y")
        assert cockpit.sent == [CheckpointRemove(checkpoint="step-00003000-1")]

    drive(scenario, session=ScriptedSession(snapshot(checkpoints=checkpoints())))


def test_the_help_and_the_palette_open() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("question_mark")
        assert isinstance(cockpit.app.screen, HelpScreen)
        assert "Upper case acts" in cockpit.text()
        await cockpit.press("escape", "colon")
        await cockpit.until("hold every rank at the next boundary")
        await cockpit.press(*"lr rel")
        await cockpit.until("give the learning rate back")
        await cockpit.press("enter", "enter")
        async with asyncio.timeout(5):
            while not cockpit.sent:
                await cockpit.pilot.pause(0.02)
        assert type(cockpit.sent[0]).__name__ == "LrRelease"

    drive(scenario)


# --- leaving


def test_q_leaves_a_run_that_was_there_before() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("q")

    assert drive(scenario) == "quit"


@pytest.mark.parametrize(("key", "left"), [("g", "go-on"), ("enter", "go-on"), ("s", "stop")])
def test_leaving_a_run_of_ones_own_asks(key: str, left: str) -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("q")
        assert isinstance(cockpit.app.screen, LeaveDialog)
        await cockpit.press("escape", "q", key)

    assert drive(scenario, owned=True) == left


def test_a_run_of_ones_own_that_ended_is_left_without_a_question() -> None:
    async def scenario(cockpit: Cockpit) -> None:
        await cockpit.press("q")

    ended = ScriptedSession(snapshot(state=run_state(state="finished")))
    assert drive(scenario, owned=True, session=ended) == "quit"
