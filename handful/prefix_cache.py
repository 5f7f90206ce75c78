"""Keys and values of prompts that were read, kept for prompts that begin as they do: system prompts, chats that go on.

What is kept is never changed and copied where it is used, which costs a thousandth of computing it: so any number of
prompts may begin with it, at any of its tokens; of layers with a window the last few hundred alone are there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from handful.observe import Recording
from handful.positions import Held

__all__ = ["Prefix", "PrefixCache", "common"]

WORTH = 16  # tokens: fewer are not kept, nor waited for


@dataclass(eq=False)
class Prefix:
    """Tokens from a sequence's first on, what a cache held of them, and their routing, where it was recorded."""

    tokens: NDArray[np.int64]
    held: Held
    routed: Recording | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def copy(self) -> Prefix:
        """Of these tokens alone, whatever else the cache holds or will hold."""
        return Prefix(self.tokens, self.held.copy(), self.routed)

    def fits(self, prompt: NDArray[np.int64], recorded: bool) -> int:
        """With how many of its tokens a prompt can begin. recorded: their routing must be there too."""
        length = common(self.tokens, prompt)
        return 0 if length < self.held.least or (recorded and self.routed is None) else length

    def serves(self, other: Prefix) -> bool:
        """Whoever begins with the other may begin with as many tokens of this one."""
        alike = common(self.tokens, other.tokens) == len(other) and self.held.least <= other.held.least
        return alike and (other.routed is None or self.routed is not None)


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
            if prefix.serves(new):
                self._use(prefix)
                return
            if new.serves(prefix):
                self._prefixes.remove(prefix)
        self._prefixes.append(new.copy())

    def shrink(self, tokens: int) -> None:
        """Keep so many tokens at most: what was used longest ago goes first."""
        while self.tokens > tokens:
            del self._prefixes[0]
