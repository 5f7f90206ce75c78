"""Sizes as people write them, "4GB", "3.5GiB", "500M", and as they are shown to people: 4.00 GB, and 3:05 of a time."""

from __future__ import annotations

import math
import re

from handful.errors import ConfigError

__all__ = ["PREFIXES", "duration", "parse_bytes", "short_time", "si", "size"]

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+) ?([KMGT]?)(I?)(B?)", re.ASCII)
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (0.0, ""))


def parse_bytes(text: str, name: str = "memory") -> int:
    """The bytes that a size names: "4GB" and "4G" are 4 · 1000³, "4GiB" and "4Gi" 4 · 1024³, "4096" is 4096.

    A fraction of a byte is cut off. ConfigError, with `name` for what was asked, for anything else and for less than
    one byte.
    """
    found = _SIZE.fullmatch(text.strip().upper())
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{name} = {text!r}: a size such as 4GB, 3.5GiB or 500MB")
    whole, _, fraction = found[1].partition(".")
    # Whole numbers all the way: a float would lose bytes of large sizes.
    unit: int = (1024 if found[3] else 1000) ** _POWERS[found[2]]
    count = int(whole + fraction or "0") * unit // 10 ** len(fraction) if len(found[1]) <= 40 else 1 << 63
    if not 1 <= count < 1 << 63:
        raise ConfigError(f"{name} = {text!r}: at least 1 byte, and less than 2^63")
    return count


def si(value: float, unit: str = "", *, short: bool = False) -> str:
    """A number in three digits with an SI prefix: 46.7 G, 305 kB, 500 FLOP.

    short   without zeros at the end, for a sentence: 8 GB, where columns of a table have 8.00 GB.
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f} {unit}".rstrip()
    value = float(f"{value:.2e}")  # rounded first: 999.5 is 1.00 k
    factor, prefix = next(pair for pair in PREFIXES if abs(value) >= pair[0])
    value /= factor or 1.0
    digits = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    if short and "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return f"{digits} {prefix}{unit}".rstrip()


def size(count: float, *, short: bool = False) -> str:
    """Bytes, as `si` shows them: 93.4 GB."""
    return si(count, "B", short=short)


def duration(seconds: float) -> str:
    """Seconds as 7 s, 3:05 or 2:10:00."""
    if not math.isfinite(seconds):
        return f"{seconds} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def short_time(seconds: float) -> str:
    """Seconds of something short, in three digits: 2.5 s, 12.3 ms, 40 µs."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit * 0.9995:
            return si(seconds / unit, name, short=True)
    return si(seconds / 1e-9, "ns", short=True)
