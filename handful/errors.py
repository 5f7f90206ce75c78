"""What can go wrong, as a tree.

HandfulError                 everything below; the command line prints it as one line
├── ConfigError              a setting is wrong: the field, its value, what would be right
├── DataError                text or tokens are missing, empty, unreadable or too few
├── CheckpointError          a checkpoint is incomplete, malformed or of a family we do not have
├── TrainingError            training cannot go on (a loss or gradient is not finite)
├── RoutingError             a routing does not fit its experts (an index out of range, a wrong shape)
├── RankLostError            another rank is gone: a pass can be made again without it, a training goes on anew
└── MissingExtraError        an optional package is needed: its name and how to install it
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HandfulError",
    "MissingExtraError",
    "RankLostError",
    "RoutingError",
    "TrainingError",
    "first_line",
]


def first_line(error: BaseException) -> str:
    """What another library's error says, as far as one line of a message of ours has room for it."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "".join(char if char.isprintable() else "�" for char in text)


class HandfulError(Exception):
    """A user's mistake or a limit of the world, told in one line."""


class ConfigError(HandfulError, ValueError):
    """A setting is wrong. The message names the field, its value and what would be right."""


class DataError(HandfulError):
    """Text or tokens are missing, empty, unreadable or too few."""


class CheckpointError(HandfulError):
    """A checkpoint is incomplete, malformed or of a family that Handful does not have."""


class TrainingError(HandfulError):
    """Training cannot go on; the last good checkpoint is kept and named."""


class RoutingError(HandfulError, ValueError):
    """A routing does not fit the experts that it is given to."""


class RankLostError(HandfulError):
    """Another rank is gone. A pass of a served model can be made again with those that are left."""


class MissingExtraError(HandfulError, ImportError):
    """An optional package is needed. The message names it and the command that installs it."""

    def __init__(self, package: str, purpose: str, extra: str | None = None) -> None:
        self.package, self.extra = package, extra
        install = f"pip install 'handful-moe[{extra}]'" if extra else f"pip install {package}"
        super().__init__(f"{purpose} needs the package {package!r}: {install}")
