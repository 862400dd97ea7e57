"""The demo's data: the sources of the Python standard library on this machine, as one array of bytes.

    files, sorted by relative path → split by a hash of that path → joined, a zero byte after each file

A training window is a pure function of (seed, absolute sample index): no generator whose state would have to be kept,
so a rollback, a resume and a skip land on exactly the bytes that an uninterrupted run would have read.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]
Batch = tuple[Tensor, Tensor]

TEXT_SUFFIXES = frozenset({".c", ".h", ".md", ".py", ".pyi", ".rst", ".toml", ".txt"})
NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__"})
VALIDATION_SHARE = 20  # one file in twenty


class NoData(Exception):
    """There is too little text to train on; the message says where it was looked for."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text as bytes, uint8 arrays of one dimension; no file has a part in both."""

    train: Bytes
    validation: Bytes
    source: str

    def __post_init__(self) -> None:
        if not len(self.train) or not len(self.validation):
            raise NoData(
                f"{self.source} holds {len(self.train)} bytes for training and {len(self.validation)} for validation: "
                "both need some; give --data DIR with a few dozen text files or more"
            )


def read_corpus(directory: Path | None = None) -> Corpus:
    """Read every source of the standard library, or the text files under `directory`.

    Raises `NoData` when there is nothing to train or to validate on, `OSError` when a file cannot be read.
    """
    if directory is None:
        root, suffixes = Path(sysconfig.get_paths()["stdlib"]), frozenset({".py"})
    else:
        root, suffixes = directory, TEXT_SUFFIXES
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name, path in _text_files(root, suffixes):
        parts[is_validation(name)].append(path.read_bytes() + b"\0")
    train, validation = (np.frombuffer(b"".join(parts[held_out]), dtype=np.uint8) for held_out in (False, True))
    return Corpus(train=train, validation=validation, source=str(root))


def _text_files(root: Path, suffixes: Iterable[str]) -> list[tuple[str, Path]]:
    """The files under `root` by their relative name, in an order that does not depend on the file system."""
    found = []
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        if path.suffix in suffixes and not NOT_THE_LIBRARY.intersection(relative.parts) and path.is_file():
            found.append((relative.as_posix(), path))
    return sorted(found)


def is_validation(relative_name: str) -> bool:
    """Whether a file is held out: decided by its name alone, so that a new Python version moves no other file."""
    digest = hashlib.blake2b(relative_name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VALIDATION_SHARE == 0


def window_starts(indices: npt.NDArray[np.uint64], *, seed: int, choices: int) -> npt.NDArray[np.int64]:
    """Where the samples with these absolute indices begin, each in [0, choices).

    SplitMix64 (Steele, Lea, Flood 2014) used as a counter-based generator: stateless, and the same on every machine.
    """
    with np.errstate(over="ignore"):  # arithmetic is meant to be modulo 2**64
        mixed = _finalise(indices + _finalise(np.uint64(seed % 2**64) + _GOLDEN) + _GOLDEN)
    starts: npt.NDArray[np.int64] = (mixed % np.uint64(choices)).astype(np.int64)
    return starts


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _finalise(value: Any) -> Any:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def windows(text: Bytes, starts: npt.NDArray[np.int64], *, context: int) -> Batch:
    """Inputs and targets (the inputs moved by one byte), each int64 of (len(starts), context)."""
    chunk = torch.from_numpy(text[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are cut. `batch_size` is per rank; an epoch reads about as many bytes as the text has."""

    context: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if min(self.context, self.batch_size, self.world_size) < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"context, batch size and world size are at least 1 and the rank is below it, not {self}")


class WindowLoader:
    """Micro-batches of random windows for one rank, resumable to the batch.

    Each iteration is one epoch, or the rest of one after `load_state_dict`. `state_dict` is exact between any two
    batches, because nothing is read ahead; taken after an epoch's last batch it leads to an iteration without batches,
    as with a `torchdata` loader, and `set_epoch` names the next one.
    """

    def __init__(self, text: Bytes, config: LoaderConfig) -> None:
        self._choices = _choices(text, config.context)
        self._text = text
        self._config = config
        self._epoch = 0
        self._batch = 0
        self._resume_at = 0

    def __len__(self) -> int:
        """Micro-batches of one epoch; the same on every rank."""
        config = self._config
        return max(1, len(self._text) // (config.context * config.batch_size * config.world_size))

    def __iter__(self) -> Iterator[Batch]:
        self._batch, self._resume_at = self._resume_at, 0
        return self._rest_of_epoch()

    def _rest_of_epoch(self) -> Iterator[Batch]:
        while self._batch < len(self):
            batch = self._read(self._epoch * len(self) + self._batch)
            self._batch += 1
            yield batch

    def _read(self, absolute_batch: int) -> Batch:
        config = self._config
        first = (absolute_batch * config.world_size + config.rank) * config.batch_size
        indices = np.arange(first, first + config.batch_size, dtype=np.uint64)
        starts = window_starts(indices, seed=config.seed, choices=self._choices)
        return windows(self._text, starts, context=config.context)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration reads; a position loaded for another epoch is forgotten."""
        if epoch != self._epoch:
            self._epoch, self._batch, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin where the state was taken."""
        self._epoch = int(state["epoch"])
        self._batch = self._resume_at = int(state["batch"])


def validation_batches(text: Bytes, config: LoaderConfig, *, count: int) -> list[Batch]:
    """`count` batches for this rank, evenly spread over the text and the same at every evaluation."""
    choices = _choices(text, config.context)
    total = count * config.world_size * config.batch_size
    starts = np.linspace(0, choices - 1, num=total).astype(np.int64)
    mine = starts.reshape(count, config.world_size, config.batch_size)[:, config.rank]
    return [windows(text, batch_starts, context=config.context) for batch_starts in mine]


def _choices(text: Bytes, context: int) -> int:
    """How many places a window can begin at. Raises `NoData` when there is none."""
    if len(text) <= context:
        raise NoData(f"the text has {len(text)} bytes, one window needs {context + 1}: give more text, or less context")
    return len(text) - context
