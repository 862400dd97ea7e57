"""The client's numbers, for places where a value may be missing and where the width should not jump."""

import math
from datetime import UTC, datetime

from trainctl.client import figures

MISSING = "n/a"


def number(value: float | None, digits: int = 4) -> str:
    """`2.347`, `10.42`, `1,204`; `NaN` in capitals, because it is news; None as n/a."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else figures.number(value, digits)


def learning_rate(value: float | None) -> str:
    """`2.80e-4`, always with the same digits."""
    if value is None:
        return MISSING
    if value == 0 or not math.isfinite(value) or abs(value) >= 0.1:
        return number(value, 3)
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def quantity(value: float | None) -> str:
    """`1.24M`."""
    return MISSING if value is None else figures.quantity(value)


def file_size(value: float | None) -> str:
    return MISSING if value is None else figures.file_size(value)


def percent(share: float | None) -> str:
    """A share of 1 as `41%`, a small one as `1.2%`."""
    if share is None:
        return MISSING
    value = share * 100
    return f"{value:.1f}%" if 0 < value < 9.95 else f"{value:.0f}%"


def duration(seconds: float | None) -> str:
    """`4s`, `3m20s`, `14m`, `2h05m`, `3d4h`: whole seconds, and none of them once minutes tell it."""
    if seconds is None:
        return MISSING
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"


def short_time(seconds: float | None) -> str:
    """A measured time: `85ms`, `0.85s`, `12.3s`."""
    if seconds is None:
        return MISSING
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f}ms"
    return f"{seconds:.2f}s" if seconds < 9.995 else f"{seconds:.1f}s"


def count(value: int | None) -> str:
    """`5,000`."""
    return MISSING if value is None else f"{value:,}"


def plural(value: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def clock(when: float) -> str:
    """The time of day here, `14:23:07`."""
    return datetime.fromtimestamp(when, tz=UTC).astimezone().strftime("%H:%M:%S")
