"""Sessions over real sockets: what is followed, what is asked, what is commanded, and a hub that dies in between."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from client.scripted_hub import Script, ScriptedHub, hub, make_checkpoint, make_info, rows, write_journal
from trainctl.client.errors import BadRequest, NotAllowed, NotReachable, Rejected
from trainctl.client.live import LiveSession
from trainctl.client.recorded import RecordedSession
from trainctl.client.session import Session, open_session
from trainctl.client.watching import watch
from trainctl.wire.commands import LrScale, LrSet, Pause, SetTunable
from trainctl.wire.keys import new_keys
from trainctl.wire.messages import Envelope, Note, Rows, RunInfo, Snapshot, StateChanged


@contextlib.asynccontextmanager
async def session_with(ref: str | None = None, **options: object) -> AsyncIterator[Session]:
    session = await open_session(ref, **options)  # type: ignore[arg-type]
    try:
        yield session
    finally:
        await session.close()


async def follow_until(session: Session, condition: Callable[[], bool], seen: list[object] | None = None) -> None:
    async with asyncio.timeout(20), contextlib.aclosing(session.follow()) as items:
        async for item in items:
            if seen is not None:
                seen.append(item)
            if condition():
                return


def test_following_brings_the_snapshot_and_then_everything_in_order() -> None:
    async def scenario() -> None:
        async with session_with() as session:
            assert session.live
            steps: list[int] = []
            async with asyncio.timeout(20), contextlib.aclosing(session.follow()) as items:
                async for item in items:
                    if session.model.link == "live" and not steps:
                        running.publish(rows(3, 5))
                        steps.append(0)
                    if isinstance(item, Envelope) and isinstance(item.body, Rows):
                        steps += item.body.steps
                        break
            assert steps == [0, 3, 4, 5]
            assert session.model.name == "gpt"
            assert session.model.metrics["loss"].step == 5

    with hub() as running:
        running.publish(rows(1, 2))
        asyncio.run(scenario())


def test_a_hub_that_is_started_again_elsewhere_is_found_and_nothing_is_missed() -> None:
    seen: list[object] = []

    async def scenario(first: ScriptedHub) -> None:
        async with session_with() as session:
            await follow_until(session, lambda: session.model.link == "live")
            first.publish(rows(1, 1))
            model = session.model
            following = asyncio.create_task(
                follow_until(session, lambda: "loss" in model.metrics and model.metrics["loss"].step == 4, seen)
            )
            async with asyncio.timeout(10):
                while "loss" not in model.metrics:  # noqa: ASYNC110 - the model is fed by the other task
                    await asyncio.sleep(0.02)
            await asyncio.to_thread(first.stop, card=False)
            second = ScriptedHub(first.info, epoch=2, record=first.record)
            second.journal = first.journal
            second.start()
            try:
                await asyncio.to_thread(second.publish, rows(2, 3))
                await asyncio.to_thread(second.publish, rows(4, 4))
                await following
            finally:
                await asyncio.to_thread(second.stop)
            assert model.lost_messages == 0

    running = ScriptedHub(make_run("run-1")).start()
    asyncio.run(scenario(running))
    bodies = [item.body for item in seen if isinstance(item, Envelope)]
    assert [step for body in bodies if isinstance(body, Rows) for step in body.steps] == [1, 2, 3, 4]


def make_run(run_id: str) -> RunInfo:
    return make_info(run_id, "gpt")


def test_a_silent_hub_is_stale_and_what_was_known_stays() -> None:
    async def scenario(running: ScriptedHub) -> None:
        async with session_with() as session:
            await follow_until(session, lambda: session.model.link == "live")
            await asyncio.to_thread(running.stop)
            seen: list[object] = []
            await follow_until(session, lambda: session.model.link == "stale", seen)
            assert seen[-1] is None, "a change of the link is told by None"
            assert session.model.state is not None
            assert session.model.state.state == "running"

    with hub() as running:
        asyncio.run(scenario(running))


def test_the_history_of_more_names_than_a_request_holds_arrives_whole() -> None:
    names = [f"model.layers.{number}.self_attn.projection.grad_norm" for number in range(10_000)]

    async def scenario() -> None:
        async with session_with("run-1", timeout_s=30.0) as session:
            await session.picture()
            found = await session.history([*names, "nothing"])
            assert list(found) == names
            assert {points.columns["step"].tolist()[-1] for points in found.values()} == {2}
            few = await session.history(names, points=400)
            assert {int(points.columns["count"].sum()) for points in few.values()} == {2}

    with hub() as running:
        for first in range(0, len(names), 1000):
            running.publish(rows(1, 2, **dict.fromkeys(names[first : first + 1000], 1.0)))
        running.set_state(step=2)
        asyncio.run(scenario())


def test_long_histories_come_in_pages_and_arrive_whole() -> None:
    async def scenario() -> None:
        async with session_with() as session:
            found = await session.history(["loss", "nothing"])
            assert list(found) == ["loss"]
            assert found["loss"].columns["step"].tolist() == list(range(1, 40_001))
            few = await session.history(["loss"], points=10)
            assert {"step", "time", "min", "max", "mean", "last", "count", "incarnation"} <= few["loss"].columns.keys()
            assert int(few["loss"].columns["count"].sum()) == 40_000

    with hub() as running:
        for first in range(1, 40_000, 8000):
            running.publish(rows(first, first + 7999, loss=1.0))
        asyncio.run(scenario())


async def outcomes(session: Session, action: object, **options: object) -> list[str]:
    async with contextlib.aclosing(session.do(action, **options)) as updates:  # type: ignore[arg-type]
        return [update.state async for update in updates]


def test_a_command_passes_through_its_states_and_ends_with_one() -> None:
    async def scenario() -> None:
        async with session_with() as session:
            assert await outcomes(session, Pause(), command_id="c1") == ["accepted", "applied"]
            assert await outcomes(session, Pause(), command_id="c1") == ["applied"], "a repeat gives the first result"
            assert await outcomes(session, LrScale(factor=0.5), condition="loss < 2", expires_s=9, revert_after=3) == [
                "accepted",
                "applied",
            ]

    script = Script()
    with hub(script=script):
        asyncio.run(scenario())
    first, sent = script.commands
    assert first.id == "c1"
    assert (sent.condition, sent.expires_s, sent.revert_after) == ("loss < 2", 9, 3)


def test_without_an_outcome_in_time_the_last_state_is_unknown_and_says_how_to_ask_again() -> None:
    async def scenario() -> None:
        async with session_with() as session:
            updates = [update async for update in session.do(Pause(), command_id="c9", timeout_s=0.5)]
            assert [update.state for update in updates] == ["accepted", "unknown"]
            assert "--command-id c9" in str(updates[-1].reason)

    with hub(script=Script(answers=lambda _: [("accepted", {})])):
        asyncio.run(scenario())


def test_a_command_survives_the_death_of_the_hub_and_happens_once() -> None:
    script = Script(answers=lambda _: [("accepted", {})])

    async def scenario(first: ScriptedHub) -> None:
        async with session_with() as session:
            states: list[str] = []
            async with asyncio.timeout(30):
                async for update in session.do(Pause(), command_id="c1", timeout_s=25):
                    states.append(update.state)
                    if states == ["accepted"]:
                        await asyncio.to_thread(first.stop, card=False)
                        script.updates["c1"] = first.update(script.commands[0], "applied")
                        second = await asyncio.to_thread(ScriptedHub(first.info, epoch=2, script=script).start)
            await asyncio.to_thread(second.stop)
            assert states == ["accepted", "applied"]

    running = ScriptedHub(make_run("run-1"), script=script).start()
    asyncio.run(scenario(running))
    assert len(script.commands) == 1


@pytest.mark.parametrize(
    ("action", "options", "words"),
    [
        (LrSet(value=-1.0), {}, "negative"),
        (LrScale(factor=float("nan")), {}, "finite"),
        (LrScale(factor=0.0), {}, "above 0"),
        (SetTunable(name="clip", value=float("inf")), {}, "finite"),
        (Pause(), {"condition": "loss <"}, "NAME OPERATOR VALUE"),
        (Pause(), {"unless": "loss < 1"}, "no time to undo"),
        (Pause(), {"command_id": "no spaces"}, "id"),
        (LrScale(factor=0.5, group=-1), {}, "lr scale"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_sent(
    action: object, options: dict[str, str], words: str
) -> None:
    async def scenario() -> None:
        async with session_with() as session:
            with pytest.raises(BadRequest, match=words):
                await outcomes(session, action, **options)

    script = Script()
    with hub(script=script):
        asyncio.run(scenario())
    assert not script.commands


def test_a_key_that_nobody_granted_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = new_keys()
    monkeypatch.setattr("trainctl.client.discover.user_keys", lambda: stranger)

    async def scenario() -> None:
        with pytest.raises(NotAllowed, match="does not know this key"):
            await open_session("gpt")

    with hub():
        asyncio.run(scenario())


def test_a_dead_hub_leaves_the_recording() -> None:
    async def scenario(directory: Path) -> None:
        async with session_with(str(directory)) as session:
            assert isinstance(session, RecordedSession)
            assert (session.live, session.model.link) == (False, "recorded")
            assert session.model.state is not None
            assert (session.model.state.state, session.model.state.step) == ("lost", 20)
            assert [type(item).__name__ async for item in session.follow()] == ["Snapshot"]
            assert (await session.history(["loss"]))["loss"].columns["step"].tolist() == list(range(1, 21))
            assert [event.text for event in await session.events(kinds=["note"])] == ["kept"]  # type: ignore[union-attr]
            listed = await session.checkpoints()
            assert (listed.last, listed.best, len(listed.checkpoints)) == ("b", "a", 2)
            assert (await session.verify("a")).ok
            assert [tunable.name for tunable in await session.tunables()] == ["clip"]
            assert await session.audit() == []
            with pytest.raises(NotReachable, match="the hub of gpt is gone"):
                await outcomes(session, Pause())

    with hub() as running:
        running.publish(rows(1, 20))
        running.publish(Note(time=5.0, step=20, incarnation=1, actor="ann", text="kept"))
        write_journal(running)
        make_checkpoint(running.info, "a", 10, when=10.0, loss=1.0)
        make_checkpoint(running.info, "b", 20, when=20.0, loss=2.0)
    asyncio.run(scenario(Path(running.info.dir)))


def test_a_finished_run_refuses_commands_and_a_damaged_checkpoint_is_named() -> None:
    async def scenario() -> None:
        async with session_with("gpt") as session:
            with pytest.raises(Rejected, match="gpt is finished since step 20"):
                await outcomes(session, Pause())
            verified = await session.verify("a")
            assert not verified.ok
            assert "data.bin is damaged" in verified.text
            with pytest.raises(BadRequest, match="no checkpoint 'x'"):
                await session.verify("x")

    with hub() as running:
        running.publish(rows(1, 20))
        running.publish(StateChanged(time=9.0, step=20, incarnation=1, state="finished"))
        write_journal(running)
        data = make_checkpoint(running.info, "a", 10) / "data.bin"
        data.write_bytes(b"x" * data.stat().st_size)
    asyncio.run(scenario())


def test_when_no_hub_comes_back_the_recording_has_the_last_word() -> None:
    async def scenario(running: ScriptedHub) -> None:
        async with session_with() as session:
            assert isinstance(session, LiveSession)
            stopped = False
            async with asyncio.timeout(30):
                async for _ in watch(session, gone_for_good_s=4.0):
                    if session.model.link == "live" and not stopped:
                        stopped = True
                        write_journal(running)
                        await asyncio.to_thread(running.stop, card=False)
            assert session.model.state is not None
            assert session.model.state.state == "lost"

    with hub() as running:
        running.publish(rows(1, 3))
        asyncio.run(scenario(running))


def test_whoever_comes_to_a_run_that_just_ended_still_gets_its_picture() -> None:
    async def scenario() -> list[object]:
        async with session_with("run-1") as session, asyncio.timeout(20):
            return [item async for item in watch(session)]

    with hub() as running:
        running.publish(rows(1, 1))
        running.set_state(state="finished")
        seen = asyncio.run(scenario())
    assert any(isinstance(item, Snapshot) for item in seen)


def test_the_audit_log_comes_as_it_stands_in_the_file() -> None:
    async def scenario() -> None:
        async with session_with() as session:
            assert [json.loads(line) for line in await session.audit()] == [{"a": 1}]
            assert [tunable.value for tunable in await session.tunables()] == [1.0]
            assert (await session.checkpoints()).checkpoints == []

    with hub(script=Script(audit=['{"a": 1}'])):
        asyncio.run(scenario())
