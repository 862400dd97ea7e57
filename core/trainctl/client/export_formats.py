"""The forms that a run can be exported in. Each writer is given parts in order and keeps no more than a few."""

import csv
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import numpy as np

from trainctl.client.errors import ClientError
from trainctl.client.export import Part
from trainctl.store.tfevents import EventFile
from trainctl.wire.messages import Column, Rows

COLUMNS: Final = ("metric", "step", "time", "value", "incarnation", "live")
_ROW_GROUP: Final = 500_000


class Writer(Protocol):
    """A context manager that closes its files; every method raises OSError."""

    def write(self, part: Part) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class CsvWriter:
    """`metrics.csv`, a line a value. Floats are written so that they read back as the same; NaN is `nan`."""

    def __init__(self, directory: Path) -> None:
        self._file = (directory / "metrics.csv").open("w", encoding="utf-8", newline="")
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerow(COLUMNS)

    def write(self, part: Part) -> None:
        steps, times = part.steps.tolist(), part.times.tolist()
        live = ["true" if on else "false" for on in part.live.tolist()]
        for name, values in part.values.items():
            self._rows.writerows(
                zip(repeat(name), steps, times, values.tolist(), repeat(part.incarnation), live, strict=False)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class ParquetWriter:
    """`metrics.parquet`, a row a value, names dictionary-encoded."""

    def __init__(self, directory: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._arrow = pa
        types = (pa.dictionary(pa.int32(), pa.string()), pa.int64(), pa.float64(), pa.float64(), pa.int64(), pa.bool_())
        self._schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
        self._file = pq.ParquetWriter(directory / "metrics.parquet", self._schema, compression="zstd")
        self._waiting: list[Any] = []
        self._rows = 0

    def write(self, part: Part) -> None:
        pa, size = self._arrow, len(part.steps)
        for name, values in part.values.items():
            names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(size, "i4")), pa.array([name]))
            numbers = pa.array(np.full(size, part.incarnation, "i8"))
            columns = [
                names,
                pa.array(part.steps),
                pa.array(part.times),
                pa.array(values),
                numbers,
                pa.array(part.live),
            ]
            self._waiting.append(pa.Table.from_arrays(columns, schema=self._schema))
            self._rows += size
        if self._rows >= _ROW_GROUP:
            self._send()

    def _send(self) -> None:
        if self._waiting:
            self._file.write_table(self._arrow.concat_tables(self._waiting).unify_dictionaries())
        self._waiting, self._rows = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._send()
        self._file.close()


class TensorBoardWriter:
    """A log directory: `live`, and `abandoned-N` for what was left behind of incarnation N."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, EventFile] = {"live": EventFile(directory / "live")}

    def write(self, part: Part) -> None:
        for name, mask in (("live", part.live), (f"abandoned-{part.incarnation}", ~part.live)):
            if not mask.any():
                continue
            if name not in self._files:
                self._files[name] = EventFile(self._directory / name)
            chosen = part.where(mask)
            columns = [
                Column(name=metric, dtype="f8", data=values.astype("<f8").tobytes())
                for metric, values in chosen.values.items()
            ]
            self._files[name].add(
                Rows(
                    attempt=0,
                    incarnation=part.incarnation,
                    steps=chosen.steps.tolist(),
                    times=chosen.times.tolist(),
                    columns=columns,
                )
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


_WRITERS: Final[dict[str, type[CsvWriter | ParquetWriter | TensorBoardWriter]]] = {
    "tensorboard": TensorBoardWriter,
    "csv": CsvWriter,
    "parquet": ParquetWriter,
}
FORMATS: Final = tuple(_WRITERS)


def writer(form: str, directory: Path) -> Writer:
    """Begin to write into a directory that exists. Raises `ClientError` where the form's library is missing."""
    try:
        return _WRITERS[form](directory)
    except ImportError as error:
        raise ClientError(
            f"{form} needs a library that is not installed here ({error.name or error}); nothing was written",
            f'pip install "trainctl-cockpit[{form}]", or export --to csv, which needs none',
        ) from None
