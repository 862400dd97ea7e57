"""Which charts a run has: the four everybody looks at, then one for each further metric that it logs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from trainctl.client.lines import data_of_a_rank
from trainctl.tui.tones import Tone

Kind: TypeAlias = Literal["value", "lr", "rate"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One metric in a plot. `smooth`: noisy, shown with its average. `sparse`: a few values, shown as points.
    `dashed`: what is meant, beside what is."""

    metric: str
    label: str
    tone: Tone
    raw_tone: Tone
    smooth: bool = False
    sparse: bool = False
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A chart: its title and its lines, the main one first. `pace`: drawn from the times of the steps."""

    title: str
    lines: tuple[Line, ...]
    kind: Kind = "value"
    pace: bool = False
    with_value: bool = False  # the newest value belongs into the title, because no other place shows it

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(line.metric for line in self.lines)


_LOSS = ("loss", "train_loss", "train/loss", "loss/train")
_VALIDATION = ("val_loss", "eval_loss", "valid_loss", "val/loss", "eval/loss", "loss/val")
_AVERAGED = ("ema_loss", "loss_ema", "train/loss_ema")
_GRADIENT = ("grad_norm", "gradient_norm", "train/grad_norm", "grad")
_TOKENS = ("tokens_per_s", "tok_per_s", "throughput/tokens_per_s", "throughput")
_STEPS = ("steps_per_s", "throughput/steps_per_s")
_NOT_ALONE = frozenset({"lr", "lr_scheduled", "step_time_s", "tokens", "epoch", "data_first", "data_last"})

_BLUE = (Tone.CURVE_1, Tone.RAW_1)
_VIOLET = (Tone.CURVE_2, Tone.RAW_2)
_AMBER = (Tone.CURVE_3, Tone.RAW_3)
_GREEN = (Tone.CURVE_4, Tone.RAW_4)


def first_of(names: Iterable[str], known: frozenset[str]) -> str | None:
    """The first of several usual names that the run logs."""
    return next((name for name in names if name in known), None)


def loss_metric(known: frozenset[str]) -> str | None:
    return first_of(_LOSS, known)


def validation_metric(known: frozenset[str]) -> str | None:
    return first_of(_VALIDATION, known)


def gradient_metric(known: frozenset[str]) -> str | None:
    return first_of(_GRADIENT, known)


def _line(metric: str, label: str, colours: tuple[Tone, Tone], *, smooth: bool = False, sparse: bool = False) -> Line:
    return Line(metric=metric, label=label, tone=colours[0], raw_tone=colours[1], smooth=smooth, sparse=sparse)


def _loss_plot(known: frozenset[str]) -> Plot:
    lines = [_line(loss_metric(known) or "loss", "train", _BLUE, smooth=True)]
    if (averaged := first_of(_AVERAGED, known)) is not None:
        lines.append(_line(averaged, "ema", _GREEN))
    if (validation := validation_metric(known)) is not None:
        lines.append(_line(validation, "val", _AMBER, sparse=True))
    return Plot(title="loss", lines=tuple(lines))


def _lr_plot(known: frozenset[str]) -> Plot:
    lines = [_line("lr", "effective", _VIOLET)]
    if "lr_scheduled" in known:
        tones = (Tone.CROSSHAIR, Tone.FAINT)
        lines.insert(0, Line(metric="lr_scheduled", label="scheduled", tone=tones[0], raw_tone=tones[1], dashed=True))
    return Plot(title="learning rate", lines=tuple(lines), kind="lr")


def _rate_plot(known: frozenset[str]) -> Plot:
    if (tokens := first_of(_TOKENS, known)) is not None:
        return Plot(title="tokens/s", lines=(_line(tokens, "", _GREEN, smooth=True),), kind="rate")
    if "samples_per_s" in known:
        return Plot(title="samples/s", lines=(_line("samples_per_s", "", _GREEN, smooth=True),), kind="rate")
    if (steps := first_of(_STEPS, known)) is not None:
        return Plot(title="steps/s", lines=(_line(steps, "", _GREEN, smooth=True),), kind="rate")
    return Plot(
        title="steps/s", lines=(_line(loss_metric(known) or "loss", "", _GREEN, smooth=True),), kind="rate", pace=True
    )


def plots_for(metrics: Iterable[str]) -> tuple[Plot, ...]:
    """The plots of a run that logs these metrics; the first four are always the same."""
    known = frozenset(metric for metric in metrics if not data_of_a_rank(metric))
    gradient = _line(gradient_metric(known) or "grad_norm", "", _AMBER, smooth=True)
    core = (_loss_plot(known), _lr_plot(known), Plot(title="gradient norm", lines=(gradient,)), _rate_plot(known))
    used = {name for plot in core for name in plot.metrics} | _NOT_ALONE
    colours = (_BLUE, _GREEN, _VIOLET, _AMBER)
    rest = (
        Plot(title=name, lines=(_line(name, "", colours[index % 4], smooth=True),), with_value=True)
        for index, name in enumerate(sorted(known - used))
    )
    return (*core, *rest)
