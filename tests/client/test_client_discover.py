"""Finding runs: by name, id, start of an id, address or directory; and clear words where none or several are meant."""

import asyncio
import os
import shutil
from pathlib import Path

import msgspec
import pytest

from client.scripted_hub import ScriptedHub, hub, make_info, rows, write_journal
from trainctl.client.discover import RunSummary, find_runs, resolve
from trainctl.client.errors import AmbiguousRun, BadRequest, NotAllowed, NotReachable, RunNotFound
from trainctl.client.session import open_session
from trainctl.wire.cards import write_card
from trainctl.wire.keys import new_keys, source_keys
from trainctl.wire.messages import Card, RankPlace, StateChanged
from trainctl.wire.paths import config_home
from trainctl.wire.rundir import RunDir, write_atomic


def found(recorded: bool = True) -> list[RunSummary]:
    return asyncio.run(find_runs(recorded=recorded))


async def name_of(ref: str | None, **options: object) -> str:
    session = await open_session(ref, **options)  # type: ignore[arg-type]
    await session.picture()
    await session.close()
    return f"{session.model.info.id if session.model.info else ''} {'live' if session.live else 'recorded'}"


def test_without_any_run_the_list_is_empty_and_the_only_live_one_is_not_found() -> None:
    assert found() == []
    with pytest.raises(RunNotFound, match="no live run") as error:
        asyncio.run(resolve(None))
    assert (error.value.exit_code, error.value.code) == (3, "run_not_found")


def test_a_run_is_known_by_name_id_start_of_id_directory_and_address() -> None:
    with hub("gpt-20260101-aa", "gpt") as running:
        address = running.card.addresses[0]
        for ref in ("gpt", "gpt-20260101-aa", "gpt-2026", running.info.dir, address, None):
            assert asyncio.run(name_of(ref)) == "gpt-20260101-aa live", ref
        assert asyncio.run(name_of(address, server_key=source_keys().public)) == "gpt-20260101-aa live"


def test_the_environment_names_the_run_and_the_argument_beats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINCTL_RUN", "run-2")
    with hub("run-1", "a"), hub("run-2", "b"):
        assert asyncio.run(name_of(None)) == "run-2 live"
        assert asyncio.run(name_of("a")) == "run-1 live"


def test_two_live_runs_and_no_name_is_refused_with_both_listed() -> None:
    with hub("run-1", "gpt"), hub("run-2", "gpt"):
        for ref in (None, "gpt", "run"):
            with pytest.raises(AmbiguousRun, match=r"run-[12].*run-[12]") as error:
                asyncio.run(resolve(ref))
            assert error.value.exit_code == 2
            assert sorted(error.value.candidates) == ["run-1", "run-2"]
            assert "-r run-" in error.value.hint


def test_an_unknown_name_or_directory_is_not_found(tmp_path: Path) -> None:
    for ref in ("nope", str(tmp_path), str(tmp_path / "nothing")):
        with pytest.raises(RunNotFound):
            asyncio.run(resolve(ref))


def test_a_finished_run_is_listed_as_recorded_and_of_one_name_the_live_one_is_meant() -> None:
    with hub("run-1", "gpt") as first:
        first.publish(rows(1, 7))
        first.publish(StateChanged(time=9.0, step=7, incarnation=1, state="finished"))
        write_journal(first)
    assert asyncio.run(name_of("gpt")) == "run-1 recorded"
    with hub("run-2", "gpt"):
        assert asyncio.run(name_of("gpt")) == "run-2 live"
        summaries = found()
        assert [(summary.id, summary.state, summary.step, summary.live) for summary in summaries] == [
            ("run-2", "running", 0, True),
            ("run-1", "finished", 7, False),
        ]
        assert [summary.id for summary in found(recorded=False)] == ["run-2"]


def test_a_killed_hub_leaves_a_lost_run_that_opens_from_its_directory() -> None:
    with hub() as running:
        running.publish(rows(1, 4))
        write_journal(running)
        running.stop(card=False)
        (summary,) = found(recorded=False)
        assert (summary.id, summary.state, summary.step, summary.reachable) == ("run-1", "lost", 4, False)
        assert asyncio.run(name_of("gpt")) == "run-1 recorded"


def test_a_hub_that_rank_0_starts_again_is_waited_for_a_moment() -> None:
    """Rank 0's process lives here, so the hub may come back; and while nobody asked, it did."""
    here = [RankPlace(rank=0, node="node-a", pid=os.getpid())]
    for ref in ("gpt", None):
        first = ScriptedHub(make_info("run-1", "gpt", ranks=here)).start()
        first.publish(rows(1, 4))
        write_journal(first)
        first.stop(card=False)
        second = ScriptedHub(first.info, epoch=2, record=first.record)

        async def scenario(ref: str | None = ref, second: ScriptedHub = second) -> str:
            asking = asyncio.create_task(name_of(ref))
            await asyncio.sleep(0)
            await asyncio.to_thread(second.start)
            return await asking

        assert asyncio.run(scenario()) == "run-1 live"
        second.stop()
        shutil.rmtree(first.info.dir)


def test_a_dead_hub_whose_directory_is_elsewhere_is_not_reachable() -> None:
    card = Card(
        kind="hub",
        source="run-9",
        name="far",
        epoch=1,
        addresses=["tcp://127.0.0.1:9"],
        server_key=source_keys().public,
        host="elsewhere",
        pid=1,
        started=1.0,
        dir="/nowhere/run-9",
    )
    write_card(card)
    with pytest.raises(NotReachable, match="far does not answer") as error:
        asyncio.run(open_session("far", timeout_s=0.5))
    assert error.value.exit_code == 3


def test_a_wrong_server_key_and_a_malformed_one_are_told_apart() -> None:
    with hub() as running:
        address = running.card.addresses[0]
        with pytest.raises((NotAllowed, NotReachable)):
            asyncio.run(open_session(address, server_key=new_keys().public, timeout_s=2.0))
        with pytest.raises(BadRequest, match="not a CURVE key"):
            asyncio.run(open_session(address, server_key="short"))


def test_keys_that_others_can_read_are_refused_with_what_to_do() -> None:
    with hub():
        (config_home() / "keys" / "user.json").chmod(0o644)
        with pytest.raises(BadRequest, match="chmod 600"):
            found()


def test_a_directory_whose_journal_is_gone_is_still_a_run() -> None:
    info = make_info("run-3", "old")
    directory = RunDir(info.dir)
    directory.create()
    write_atomic(directory.info_file, msgspec.json.encode(info))
    (summary,) = found()
    assert (summary.run, summary.state, summary.step) == ("old", "lost", 0)


def test_files_that_are_no_cards_and_no_runs_are_passed_over() -> None:
    with hub() as running:
        RunDir(running.info.dir).path.parent.joinpath("junk").mkdir()
        cards = Path(running.info.dir).parents[1] / "cards"
        (cards / "broken.json").write_text("{")
        assert [summary.id for summary in found()] == ["run-1"]
