"""What `trainctl doctor` looks at. Each check is a function that returns what it found; none repairs anything."""

import locale
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from trainctl.cli.foreign import foreign_packages
from trainctl.cli.launch import torch_found
from trainctl.wire.paths import UnsafePath, cards_dir, config_home, runs_dir, socket_dir, state_home
from trainctl.wire.settings import SettingsError, load_settings, settings_file

Verdict: TypeAlias = Literal["ok", "warning", "broken"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    text: str
    hint: str = ""


def python() -> Finding:
    return Finding(name="python", verdict="ok", text=f"{platform.python_version()} in {sys.prefix}")


def torch() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    if not torch_found():
        return Finding(
            name="torch",
            verdict="warning",
            text="not installed here: watching and acting work, `run` and `demo` do not",
            hint="training environments need torch 2.6 or newer; a head node does not",
        )
    try:
        found = version("torch")
    except PackageNotFoundError:
        return Finding(name="torch", verdict="warning", text="installed without metadata: its version is not known")
    parts = found.split("+")[0].split(".")
    number = tuple(int(part) for part in parts[:2] if part.isdigit())
    if number < (2, 6):
        return Finding(name="torch", verdict="broken", text=f"{found} is too old", hint="install torch 2.6 or newer")
    return Finding(name="torch", verdict="ok", text=found)


def nvml() -> Finding:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        quiet = not Path("/dev/nvidiactl").exists()
        text = "no NVIDIA driver here: GPUs are not shown, all else works"
        if quiet:
            return Finding(name="nvml", verdict="ok", text=text)
        return Finding(
            name="nvml", verdict="warning", text=f"the driver is there and NVML says: {error}", hint="nvidia-smi"
        )
    try:
        count, driver = pynvml.nvmlDeviceGetCount(), pynvml.nvmlSystemGetDriverVersion()
        return Finding(name="nvml", verdict="ok", text=f"driver {driver}, {count} GPUs")
    except pynvml.NVMLError as error:
        return Finding(name="nvml", verdict="warning", text=f"NVML says: {error}", hint="compare with nvidia-smi")
    finally:
        pynvml.nvmlShutdown()


def keys() -> Finding:
    """Looks at the files' modes; makes no keys."""
    directory = config_home() / "keys"
    found = []
    for name in ("user.json", "source.json"):
        path = directory / name
        try:
            status = path.stat()
        except OSError:
            continue
        found.append(name)
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            return Finding(
                name="keys",
                verdict="broken",
                text=f"the secret key {path} can be read by others",
                hint=f"if nobody has: chmod 600 {path}; otherwise delete it, a new one is made",
            )
    text = f"{', '.join(found)} in {directory}, private" if found else f"none yet; made on first use in {directory}"
    return Finding(name="keys", verdict="ok", text=text)


def sockets() -> Finding:
    try:
        directory = socket_dir()
    except (UnsafePath, OSError) as error:
        return Finding(name="sockets", verdict="broken", text=str(error), hint="set TMPDIR to a directory of yours")
    return Finding(name="sockets", verdict="ok", text=str(directory))


def state() -> Finding:
    """Whether run directories and cards can be written, by writing one file beside them."""
    home = state_home()
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home, prefix=".doctor-"):
            pass
    except OSError as error:
        return Finding(
            name="state",
            verdict="broken",
            text=f"{home} cannot be written: {error.strerror or error}",
            hint="set TRAINCTL_HOME to a directory that all nodes of the job share",
        )
    runs = len(list(runs_dir().glob("*"))) if runs_dir().is_dir() else 0
    cards = len(list(cards_dir().glob("*.json"))) if cards_dir().is_dir() else 0
    return Finding(name="state", verdict="ok", text=f"{home}, {runs} runs, {cards} cards")


def packages() -> Finding:
    foreign = foreign_packages()
    if foreign:
        return Finding(
            name="packages",
            verdict="warning",
            text=f"another project called trainctl is installed: {', '.join(foreign)}",
            hint="this one is trainctl-cockpit; remove the other: pip uninstall trainctl",
        )
    return Finding(name="packages", verdict="ok", text="no other project's trainctl beside this one")


def terminal() -> Finding:
    """Colours and glyphs, from the environment: nothing is sent to the terminal."""
    name, encoding = os.environ.get("TERM", ""), locale.getpreferredencoding(False)
    colours = "no colours (NO_COLOR)" if "NO_COLOR" in os.environ else _colours(name)
    if encoding.lower().replace("-", "") != "utf8":
        return Finding(
            name="terminal",
            verdict="warning",
            text=f"{name or 'unknown'}, encoding {encoding}: charts fall back to ASCII",
            hint="set LANG to a UTF-8 locale, for example C.UTF-8",
        )
    if name in {"", "dumb"}:
        return Finding(name="terminal", verdict="ok", text="none here: `log` and `status` work, the cockpit needs one")
    return Finding(name="terminal", verdict="ok", text=f"{name}, {colours}, UTF-8")


def _colours(name: str) -> str:
    if os.environ.get("COLORTERM") in {"truecolor", "24bit"}:
        return "16M colours"
    return "256 colours" if "256" in name else "16 colours"


def sources() -> Finding:
    """Which setting came from where."""
    homes, run = ("TRAINCTL", "TRAINCTL_HOME", "TRAINCTL_CONFIG"), ("TRAINCTL_RUN", "TRAINCTL_RUN_ID")
    names = (*homes, *run, "TRAINCTL_PREEMPT_SIGNAL", "NO_COLOR")
    found = [f"{name}={os.environ[name]} (environment)" for name in names if name in os.environ]
    config = settings_file()
    if not config.exists():
        found.append(f"no {config}")
        return Finding(name="settings", verdict="ok", text=", ".join(found))
    try:
        settings = load_settings(config)
    except SettingsError as error:
        return Finding(name="settings", verdict="broken", text=str(error), hint="correct or remove it")
    found += [
        f"{table}={value} ({config})"
        for table, value in msgspec.to_builtins(settings).items()
        if value and table != "unknown"
    ]
    if settings.unknown:
        return Finding(
            name="settings",
            verdict="warning",
            text=f"{config}: there is no setting {', '.join(settings.unknown)}: it changes nothing",
            hint="compare the spelling with docs/alerts.md, docs/sinks.md and docs/preemption.md",
        )
    return Finding(name="settings", verdict="ok", text=", ".join(found))


def alerts() -> Finding:
    """Whether the alert command exists here; it is not run."""
    try:
        arguments = load_settings().alerts.arguments
    except SettingsError:
        return Finding(name="alerts", verdict="warning", text="not known: the settings cannot be read")
    if not arguments:
        return Finding(name="alerts", verdict="ok", text="no command: nobody is woken (docs/alerts.md)")
    program = arguments[0]
    path = str(settings_file().parent / program) if "/" in program else program  # as the hub starts it
    if shutil.which(path) is None:
        wrong = "is not executable" if "/" in program and Path(path).exists() else "does not exist"
        return Finding(
            name="alerts",
            verdict="warning",
            text=f"the command {program} {wrong} on this machine: nobody would be woken",
            hint=f"correct [alerts] command in {settings_file()}; it has to be where rank 0 runs",
        )
    return Finding(name="alerts", verdict="ok", text=f"{' '.join(arguments)} is there")


def runs() -> Iterator[Finding]:
    """Live runs, asked one by one; a card whose hub is gone is no fault."""
    import asyncio

    from trainctl.client.discover import find_runs
    from trainctl.client.errors import ClientError

    try:
        found = asyncio.run(find_runs(recorded=False))
    except ClientError as error:
        yield Finding(name="runs", verdict="broken", text=error.message, hint=error.hint)
        return
    for summary in found:
        name = f"run {summary.run}"
        if summary.problem:
            yield Finding(name=name, verdict="warning", text=summary.problem, hint=f"its id is {summary.id}")
        elif summary.live:
            yield Finding(name=name, verdict="ok", text=f"{summary.state} at step {summary.step}, reachable")
    if not any(summary.live for summary in found):
        yield Finding(name="runs", verdict="ok", text="none live")


CHECKS: tuple[Callable[[], Finding], ...] = (
    python,
    torch,
    nvml,
    keys,
    sockets,
    state,
    packages,
    terminal,
    sources,
    alerts,
)
