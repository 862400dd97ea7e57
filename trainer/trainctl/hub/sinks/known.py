"""The sinks there are, and which of them a user and a script want."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import msgspec

from trainctl.hub.sinks.sink import Sink, Unusable

# name: (module and classes of trainctl.hub.sinks, the library it needs). Extras of the package have the sink's name.
_KNOWN: dict[str, tuple[str, str, str, str]] = {
    "tensorboard": ("tensorboard", "TensorBoardSink", "TensorBoardSettings", "tensorboard"),
    "wandb": ("wandb", "WandbSink", "WandbSettings", "wandb"),
    "mlflow": ("mlflow", "MlflowSink", "MlflowSettings", "mlflow"),
    "prometheus": ("prometheus", "PrometheusSink", "PrometheusSettings", "prometheus_client"),
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A sink that is switched on."""

    name: str
    kind: type[Sink]
    make: Callable[[], Sink]


def wanted(
    configured: Mapping[str, dict[str, Any]],
    asked: Iterable[str],
    known: Mapping[str, tuple[str, str, str, str]] = _KNOWN,
) -> tuple[list[Wanted], list[str]]:
    """The sinks that the configuration (by name, with settings) and the script (by name) switch on, and what is wrong
    with the others, in words. `enabled = false` in the configuration overrules the script."""
    found, problems = [], []
    for name in dict.fromkeys([*configured, *asked]):
        if name not in known:
            problems.append(f"there is no sink {name!r}; there are: {', '.join(known)}")
            continue
        try:
            one = _one(name, configured.get(name, {}), known[name])
        except Unusable as problem:
            problems.append(str(problem))
        else:
            found.extend([one] if one is not None else [])
    return found, problems


def _one(name: str, given: dict[str, Any], known: tuple[str, str, str, str]) -> Wanted | None:
    module_name, sink_class, settings_class, library = known
    module = importlib.import_module(f"trainctl.hub.sinks.{module_name}")
    try:
        settings = msgspec.convert(given, getattr(module, settings_class))
    except msgspec.ValidationError as error:
        raise Unusable(f"sink {name} is off: [sinks.{name}] in config.toml: {error}") from None
    if not settings.enabled:
        return None
    if importlib.util.find_spec(library) is None:
        raise Unusable(
            f'sink {name} is off: {library} is not installed where the hub runs; pip install "trainctl-cockpit[{name}]"'
            ". Training and everything else go on"
        )
    kind = cast("type[Sink]", getattr(module, sink_class))
    return Wanted(name=name, kind=kind, make=partial(cast("Callable[[Any], Sink]", kind), settings))
