"""The rows of a data set on the Hugging Face Hub, or of a folder laid out like one, through the package `datasets`.

hf:org/name                    its split "train"
hf:org/name:split              another; split[:1000] and split[5000:6000] are streamed: no more is downloaded
hf:org/name:config             of one that has several configurations
hf:org/name:config:split
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from handful.errors import DataError, MissingExtraError
from handful.formats import SAMPLE, choose_column

__all__ = ["rows_of"]

LISTED = 12  # configurations that a message names at most
PART = re.compile(r"([\w.-]+)\[(\d*):(\d*)\]", re.ASCII)


def rows_of(source: str, column: str | None = None) -> Iterator[Any]:
    """The text of every row; None, or what is no text, where a row has none.

    column   as for `read_documents`. DataError for what is not there, MissingExtraError without `datasets`.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", f"data {source!r}", extra="datasets") from None
    try:
        rows = _open(datasets, source)
        # A streamed data set may not know its columns before its first row.
        first = list(islice(rows, SAMPLE))
        names = list(dict.fromkeys(name for row in first for name in row))
        chosen = column or choose_column(first)
        if first and (chosen is None or chosen not in names):
            raise DataError(
                f"data {source!r}: no column {column or 'text'!r} among {', '.join(names)}; name one by --column"
            )
        yield from (row[chosen] if isinstance(row[chosen], str) else None for row in chain(first, rows))
    except DataError:
        raise
    except Exception as error:  # of many kinds: no network, no such name, no such split, …
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"data {source!r}: {message}") from None


def _open(datasets: Any, source: str) -> Iterator[Any]:
    name, *asked = re.split(r":(?![^\[]*\])", source.removeprefix("hf:"))  # not at the colon within [:1000]
    if len(asked) > 2:
        raise DataError(f"data {source!r}: of the form hf:name, hf:name:split, hf:name:config or hf:name:config:split")
    configs = datasets.get_dataset_config_names(name)
    config, split = None, "train"
    if len(asked) == 2:
        config, split = asked
    elif asked and asked[0] in configs:
        config = asked[0]
    elif asked:
        split = asked[0]
    if config is None and len(configs) > 1 and "default" not in configs:
        listed = ", ".join(configs[:LISTED]) + (f" and {len(configs) - LISTED} more" if len(configs) > LISTED else "")
        raise DataError(f"data {source!r}: name one of its configurations, as hf:{name}:{configs[0]}: {listed}")
    part = PART.fullmatch(split)
    if part is None:  # all of it, or percents: downloaded once, and kept by `datasets`
        return iter(datasets.load_dataset(name, config, split=split))
    rows = datasets.load_dataset(name, config, split=part[1], streaming=True)
    return islice(rows, int(part[2] or 0), int(part[3]) if part[3] else None)
