"""Sizes as people write them: "4GB", "3.5GiB", "500M"."""

from __future__ import annotations

import re

from handful.errors import ConfigError

__all__ = ["parse_bytes"]

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+) ?([KMGT]?)(I?)(B?)", re.ASCII)


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
