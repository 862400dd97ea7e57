"""`config.toml`: what a user set once for all runs. Read by the hub, the agent, the command line and the cockpit.

    [alerts]
    command = ["/usr/local/bin/page", "--team", "training"]   # or one string, split as a shell would

    [sinks.tensorboard]
    dir = "/data/tensorboard"

    [preemption]
    signal = "USR1"
    grace_s = 20

A file that cannot be read, or a value of the wrong type, is a `SettingsError`; unknown names are kept in `unknown` so
that `doctor` can name a misspelling, and change nothing.
"""

import shlex
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from trainctl.wire.paths import config_home


class SettingsError(ValueError):
    """The configuration file is there and cannot be used; the message names the file and the place."""


class AlertSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to wake, and how often at most."""

    command: str | list[str] | None = None
    severity: Literal["info", "warning", "error"] = "warning"  # the least that wakes
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 30.0  # the command is ended after it
    per_hour: Annotated[int, msgspec.Meta(ge=0)] = 20  # further ones wait
    repeat_s: Annotated[float, msgspec.Meta(ge=0)] = 300.0  # the same thing again within this time waits

    def __post_init__(self) -> None:
        try:
            words = self.arguments
        except (ValueError, RuntimeError) as error:  # an open quote; a home directory of nobody
            raise ValueError(f"command cannot be used: {error}") from None
        if words and not words[0]:
            raise ValueError("command begins with an empty word")
        if any("\0" in word for word in words):
            raise ValueError("command has a NUL character in it")

    @property
    def arguments(self) -> list[str]:
        """The command as a list of words, with `~` of the first one resolved; empty where there is none."""
        if self.command is None:
            return []
        words = shlex.split(self.command) if isinstance(self.command, str) else list(self.command)
        if words and words[0].startswith("~"):
            words[0] = str(Path(words[0]).expanduser())
        return words


class PreemptionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What `trainctl run` takes for the scheduler's warning, and how long ranks have after SIGTERM."""

    signal: str = "USR1"
    grace_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 20.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file."""

    alerts: AlertSettings = AlertSettings()
    preemption: PreemptionSettings = PreemptionSettings()
    sinks: dict[str, dict[str, Any]] = {}
    unknown: tuple[str, ...] = ()


def settings_file() -> Path:
    return config_home() / "config.toml"


def load_settings(path: Path | None = None) -> Settings:
    """The user's settings; the defaults where there is no file. Raises `SettingsError`."""
    file = path or settings_file()
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read: {error}") from None
    found.pop("unknown", None)
    try:
        settings = msgspec.convert(found, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{file}: {error}") from None
    return msgspec.structs.replace(settings, unknown=tuple(_unknown(found)))


def _unknown(found: dict[str, Any]) -> list[str]:
    names = [name for name in found if name not in Settings.__struct_fields__]
    tables: dict[str, type[msgspec.Struct]] = {"alerts": AlertSettings, "preemption": PreemptionSettings}
    for table, kind in tables.items():
        names += [f"{table}.{name}" for name in found.get(table, {}) if name not in kind.__struct_fields__]
    return names
