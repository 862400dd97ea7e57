"""Numbers and texts as people read them: three to four significant digits, units, and nothing a terminal would obey."""

import math

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_GIB = 2**30


def plain(text: str) -> str:
    """Text without control characters, escape sequences' introducers and invisible marks; line ends become spaces."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\n\r\t" else "" for c in text)


def not_finite(value: float) -> str | None:
    """`nan`, `inf` or `-inf`, or None for a number."""
    if math.isfinite(value):
        return None
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def number(value: float, digits: int = 4) -> str:
    """`digits` significant digits, trailing zeros kept: 2.347, 0.6700, 123.4; far from one as 2.8e-4."""
    if word := not_finite(value):
        return word
    size = abs(value)
    if value == 0:
        return "0"
    if size < 1e-3 or size >= 1e6:
        return scientific(value, digits)
    # The exponent is read after rounding, because 9.9996 becomes 10.00.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def scientific(value: float, digits: int = 3) -> str:
    """2.8e-4, 0.05: up to `digits` significant ones, without padding."""
    if word := not_finite(value):
        return word
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 1e4:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def two_decimals(value: float) -> str:
    """0.67 where two decimals say enough, three significant digits elsewhere."""
    if math.isfinite(value) and 0.1 <= abs(value) < 100:
        return f"{value:.2f}"
    return number(value, 3)


def quantity(value: float) -> str:
    """Three significant digits with an SI prefix: 1.24M, 850, 3.5k."""
    if word := not_finite(value):
        return word
    for size, letter in _SI:
        if abs(value) >= size * 0.9995:
            return f"{number(value / size, 3)}{letter}"
    return number(value, 3)


def file_size(size: float) -> str:
    """Bytes with decimal units, as disks count: 1.2 GB."""
    for unit, letter in _SI:
        if size >= unit:
            return f"{size / unit:.1f} {letter.upper()}B"
    return f"{size:.0f} B"


def memory(used_bytes: float | None, total_bytes: float | None = None) -> str:
    """Memory as GPU makers print it (a "GB" of 2**30 bytes): 72/80 GB."""
    if used_bytes is None:
        return "n/a"
    used = used_bytes / _GIB
    shown = f"{used:.0f}" if used >= 10 else f"{used:.1f}"
    return f"{shown}/{total_bytes / _GIB:.0f} GB" if total_bytes else f"{shown} GB"


def duration(seconds: float) -> str:
    """The two largest units: 22h15m, 3m20s, 45s, 2d4h; under ten seconds one decimal."""
    if word := not_finite(seconds):
        return word
    if seconds < 10:
        return f"{seconds:.1f}s".replace(".0s", "s")
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size}{unit}{rest}{smaller}" if rest else f"{whole // size}{unit}"
    return f"{whole}s"


def scalar(value: bool | float | str | None) -> str:
    """One setting's value."""
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(not_finite(value))
    return plain(str(value))
