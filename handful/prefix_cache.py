"""Keys and values of prompts that were read, kept for prompts that begin as they do: system prompts, chats that go on.

What is kept is never changed and copied where it is used, which costs a thousandth of computing it: so any number of
prompts may begin with it, at any of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from handful.observe import Recording

__all__ = ["Prefix", "PrefixCache", "common"]

WORTH = 16  # tokens: fewer are not kept, nor waited for


@dataclass(eq=False)
class Prefix:
    """Tokens from a sequence's first on, what a cache held of them, and their routing, where it was recorded."""

    tokens: NDArray[np.int64]
    keys_values: Sequence[tuple[Tensor, ...]]
    routed: Recording | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def copy(self) -> Prefix:
        """Of these tokens alone, whatever else the cache holds or will hold."""
        length = len(self)
        keys_values = [tuple(held[:, :, :length].clone() for held in layer) for layer in self.keys_values]
        return Prefix(self.tokens, keys_values, self.routed)

    def fits(self, prompt: NDArray[np.int64], recorded: bool) -> int:
        """With how many of its tokens a prompt begins. recorded: their routing must be there too."""
        return 0 if recorded and self.routed is None else common(self.tokens, prompt)


def common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


class PrefixCache:
    """Prefixes, those that were used last at the end."""

    def __init__(self) -> None:
        self._prefixes: list[Prefix] = []

    @property
    def tokens(self) -> int:
        """That are kept."""
        return sum(map(len, self._prefixes))

    def find(self, prompt: NDArray[np.int64], recorded: bool) -> tuple[Prefix | None, int]:
        """The prefix that a prompt has the most tokens of, and how many."""
        best, most = None, 0
        for prefix in self._prefixes:
            length = prefix.fits(prompt, recorded)
            if length > most:
                best, most = prefix, length
        if best is not None:
            self._use(best)
        return best, most

    def _use(self, prefix: Prefix) -> None:
        self._prefixes.remove(prefix)
        self._prefixes.append(prefix)

    def keep(self, new: Prefix) -> None:
        """Keep a copy of a prefix, unless it is kept already; what it goes on from is not kept twice."""
        if len(new) < WORTH:
            return
        for prefix in [*self._prefixes]:
            alike = common(prefix.tokens, new.tokens)
            if alike == len(new) and (new.routed is None or prefix.routed is not None):
                self._use(prefix)
                return
            if alike == len(prefix) and (new.routed is not None or prefix.routed is None):
                self._prefixes.remove(prefix)
        self._prefixes.append(new.copy())

    def shrink(self, tokens: int) -> None:
        """Keep so many tokens at most: what was used longest ago goes first."""
        while self.tokens > tokens:
            del self._prefixes[0]
