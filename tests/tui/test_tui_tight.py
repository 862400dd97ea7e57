"""Only what changed goes to the terminal; and what we rely on inside the toolkit is there."""

import asyncio
import io

from rich.console import Console
from scripted_session import ScriptedSession, run_state, snapshot
from textual._compositor import ChopsUpdate, Compositor

from trainctl.tui.app import CockpitApp
from trainctl.tui.grid import Grid
from trainctl.tui.theme import look_for
from trainctl.tui.tight import TightCompositor, TightUpdate
from trainctl.tui.tones import Tone


def test_a_span_is_cut_on_both_sides() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None)
    grid = Grid(20, 1)
    grid.put(0, 0, "abcdefghijklmnopqrst")
    chops = [{0: grid.strip(0, look_for(color_system=None, no_color=True).palette)}]
    text = TightUpdate(chops, [(0, 5, 8)], [[20]]).render_segments(console)
    assert "fgh" in text
    assert "e" not in text
    assert "i" not in text
    assert text.startswith("\x1b[1;6H")


def test_the_toolkit_still_has_what_is_replaced() -> None:
    assert "render_partial_update" in vars(Compositor)
    assert "render_segments" in vars(ChopsUpdate)

    async def scenario() -> None:
        app = CockpitApp(ScriptedSession(snapshot()))
        async with app.run_test(size=(120, 36)):
            assert isinstance(app.screen._compositor, TightCompositor)

    asyncio.run(scenario())


def test_a_new_step_costs_a_few_cells() -> None:
    async def scenario() -> None:
        session = ScriptedSession(snapshot())
        app = CockpitApp(session)
        async with app.run_test(size=(180, 50)) as pilot:
            await asyncio.wait_for(app.first_picture.wait(), 10)
            await pilot.pause()
            before = app.cockpit.query_one("#header").grid  # type: ignore[attr-defined]
            session.say(run_state(step=5001))
            await pilot.pause()
            app.cockpit.redraw()
            after = app.cockpit.query_one("#header").grid  # type: ignore[attr-defined]
            changed = sum(end - start for _, start, end in after.changes(before))
            assert 0 < changed <= 12

    asyncio.run(scenario())


def test_spans_hold_exactly_the_changes_and_join_neighbours() -> None:
    one, two = Grid(40, 2), Grid(40, 2)
    two.put(3, 0, "x")
    two.put(7, 0, "y")
    two.put(30, 0, "z", Tone.ERROR)
    assert two.changes(one) == [(0, 3, 8), (0, 30, 31)]
    assert one.changes(one) == []


def test_a_wide_character_is_never_cut_in_two() -> None:
    one, two = Grid(20, 1), Grid(20, 1)
    two.put(4, 0, "学習")
    assert two.text() == ["    学習            "]
    assert two.changes(one) == [(0, 0, 20)]
