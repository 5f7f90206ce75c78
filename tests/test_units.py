"""Sizes and numbers, as people write them and as they are shown to people."""

from __future__ import annotations

import math

import pytest

from handful.errors import ConfigError
from handful.units import parse_bytes, short_time, si, size

# ---------------------------------------------------------------------------------------------------------------------
# As people write them.


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GB", 4 * 10**9),
        ("4G", 4 * 10**9),
        ("4GiB", 4 << 30),
        ("4Gi", 4 << 30),
        ("500MB", 500 * 10**6),
        ("3.5G", 3_500_000_000),
        (" 1.5 tib ", 3 << 39),
        (".5k", 500),
        ("4096", 4096),
        ("17B", 17),
        ("9007199254740993B", (1 << 53) + 1),
        ("0.1GB", 10**8),
        ("1.0009k", 1000),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "4XB", "4 4GB", "-1GB", "1e9", "nan", "inf", "4GBB", "4iB", "1..5G", "5.G", "٣GB", "1_000"]
)
def test_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^budget = .*: a size such as 4GB, 3.5GiB or 500MB$"):
        parse_bytes(text, "budget")


@pytest.mark.parametrize("text", ["0", "0.9", "0GB", "8388608TiB", "9" * 5000])
def test_a_size_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="at least 1 byte, and less than 2"):
        parse_bytes(text)


# ---------------------------------------------------------------------------------------------------------------------
# As they are shown.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00123, "0.00123"),
        (0.5, "0.500"),
        (1, "1.00"),
        (45, "45.0"),
        (999, "999"),
        (999.4, "999"),
        (999.5, "1.00 k"),  # rounded before the prefix is chosen
        (1000, "1.00 k"),
        (12345, "12.3 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (46.7e9, "46.7 G"),
        (1e12, "1.00 T"),
        (1e15, "1.00 P"),
        (1e18, "1.00 E"),
        (1.5e21, "1500 E"),
        (-2500, "-2.50 k"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
    ],
)
def test_si(value: float, text: str) -> None:
    assert si(value) == text


def test_units() -> None:
    assert si(46.7e9, "FLOP") == "46.7 GFLOP"
    assert si(0, "FLOP") == "0 FLOP"
    assert si(500, "FLOP") == "500 FLOP"
    assert (size(0), size(305e3), size(93.4e9), size(math.inf)) == ("0 B", "305 kB", "93.4 GB", "inf B")


@pytest.mark.parametrize(
    ("count", "table", "sentence"),
    [
        (0, "0 B", "0 B"),
        (1, "1.00 B", "1 B"),
        (999, "999 B", "999 B"),
        (100_000, "100 kB", "100 kB"),
        (999_400_000, "999 MB", "999 MB"),
        (999_900_000, "1.00 GB", "1 GB"),
        (8 * 10**9, "8.00 GB", "8 GB"),
        (8_504_000_000, "8.50 GB", "8.5 GB"),
        (100 * 10**9, "100 GB", "100 GB"),
        (999_499_999_999, "999 GB", "999 GB"),
        (999_500_000_000, "1.00 TB", "1 TB"),
        (1000 * 10**9, "1.00 TB", "1 TB"),
        (1_342_000_000_000, "1.34 TB", "1.34 TB"),
        (20 * 10**12, "20.0 TB", "20 TB"),
        (math.inf, "inf B", "inf B"),
    ],
)
def test_sizes_in_tables_and_sentences(count: float, table: str, sentence: str) -> None:
    assert size(count) == table
    assert size(count, short=True) == sentence


def test_short_times() -> None:
    found = [short_time(seconds) for seconds in (2.5, 1, 0.99999, 0.0123, 40e-6, 999.7e-6, 3e-9, 0)]
    assert found == ["2.5 s", "1 s", "1 s", "12.3 ms", "40 µs", "1 ms", "3 ns", "0 ns"]
