"""`bench/checkpoint_stall.py --gate` fails where a checkpoint stalls for longer than promised, and nowhere else."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench" / "checkpoint_stall.py"


@pytest.fixture
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("checkpoint_stall", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gate(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, ours: dict[int, float], *more: str) -> str | None:
    """Run it with measurements in which the bare copy took 0.1 s; what it ended with."""

    def measured(millions: int, _rounds: int, _peer_rounds: int, _width: int) -> dict[str, Any]:
        return {"parameters": millions * 10**6, "best": {"ours": ours[millions], "warm_copy": 0.1}}

    monkeypatch.setattr(bench, "measure", measured)
    threads = ["--threads", str(torch.get_num_threads())]  # as they are: it is the tests' own process
    monkeypatch.setattr(sys, "argv", ["checkpoint_stall.py", *threads, "--millions", *map(str, ours), *more])
    try:
        bench.main()
    except SystemExit as ended:
        return str(ended)  # a sentence, with which Python exits with 1
    return None


def test_it_fails_with_a_sentence_above_the_promised_share_from_100_million_parameters_on(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gate(bench, monkeypatch, {10: 9.0, 100: 0.109, 500: 0.1}, "--gate") is None
    assert gate(bench, monkeypatch, {10: 9.0, 100: 0.112, 500: 0.1}) is None, "not asked for"
    assert gate(bench, monkeypatch, {10: 9.0, 100: 0.112, 500: 0.1}, "--gate") == (
        "a checkpoint of 100 M parameters stops training for 0.112 s at best, 1.12 times the bare copy (0.100 s): at "
        "most 1.1 is promised"
    )


def test_it_refuses_to_gate_nothing(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoint_stall.py", "--millions", "10", "--gate"])
    with pytest.raises(SystemExit) as refused:
        bench.main()
    assert refused.value.code == 2
    assert "needs a size of 100 million parameters or more" in capsys.readouterr().err
