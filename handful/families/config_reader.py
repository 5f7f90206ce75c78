"""A reader of config.json that checks each field: for families that are counted without rows of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from handful.config import MOST_LAYERS
from handful.errors import CheckpointError
from handful.families.config_fields import REQUIRED, Values, refusal

__all__ = ["EXPERTS", "SHARED", "ConfigReader", "check_sizes"]

LARGEST = 2**48
# Beyond these no model is near, and counting would no longer be quick.
MOST_EXPERTS = 100_000
LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer", "num_decoder_layers")
SHARED = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_sizes(values: Values) -> None:
    """CheckpointError for a number that no model has, wherever it stands: what reads the fields may count up to it."""
    for key, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                check_sizes(item)
            elif isinstance(item, int) and abs(item) > LARGEST:
                raise refusal(str(key), _short(item), f"at most {LARGEST}")
        for names, most in ((LAYERS, MOST_LAYERS), (EXPERTS, MOST_EXPERTS)):
            if key in names and isinstance(value, int) and value > most:
                raise refusal(key, value, f"at most {most}")


def _short(value: int) -> int | float:
    """A number that can be printed: Python refuses to print whole ones of more than 4300 digits."""
    try:
        return value if abs(value) < 10**30 else float(value)
    except OverflowError:
        return float("inf")


class ConfigReader:
    """A config.json's values, and which of them were read.

    used      the fields that were asked for.
    assumed   what was taken for sizes that are not there, as "name = value".
    """

    def __init__(self, values: Values) -> None:
        self.values = values
        self.used: set[str] = set()
        self.assumed: list[str] = []

    def get(self, *names: str) -> tuple[str, Any]:
        """The first of the names that is there and not null, and its value; the first name and None if none is."""
        self.used.update(names)
        return next(((n, self.values[n]) for n in names if self.values.get(n) is not None), (names[0], None))

    def size(self, *names: str, default: Any = REQUIRED, least: int = 1, told: bool = True) -> int:
        """A whole number under any of these names; a default that is taken for it is `told` among the assumed.

        CheckpointError if it is none, or not there and without a default."""
        name, value = self.get(*names)
        if value is None:
            if default is REQUIRED:
                raise CheckpointError(f"config.json: {name} is missing")
            if told:
                self.assumed.append(f"{name} = {default}")
            return int(default)
        return _whole(name, value, least)

    def same(self, *names: str, default: Any = REQUIRED, least: int = 1, told: bool = True) -> int:
        """A whole number, or a list of one for every layer, all alike."""
        name, value = self.get(*names)
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise refusal(name, value, "one number for all layers")
            return _whole(name, value[0], least)
        return self.size(*names, default=default, least=least, told=told)

    def flag(self, name: str, default: bool, *, told: bool = False) -> bool:
        """True or false."""
        _, value = self.get(name)
        if value is None:
            if told:
                self.assumed.append(f"{name} = {str(default).lower()}")
            return default
        if not isinstance(value, bool):
            raise refusal(name, value, "true or false")
        return value

    def names(self, name: str, allowed: Iterable[str], layers: int) -> list[str] | None:
        """A list that says of every layer what it is; it may go on beyond the last. None: there is none."""
        _, value = self.get(name)
        if value is None:
            return None
        allowed = tuple(allowed)
        if not isinstance(value, list) or len(value) < layers or any(item not in allowed for item in value[:layers]):
            raise refusal(name, value, f"a list with one of {', '.join(allowed)} for each of {layers} layers")
        return value[:layers]

    def only(self, name: str, right: Any) -> None:
        """CheckpointError unless a field is absent, null or this value: another would change the parameters."""
        _, value = self.get(name)
        if value is not None and value != right:
            raise refusal(name, value, f"only {right!r} can be counted")


def _whole(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise refusal(name, value, "a whole number")
    if value < least:
        raise refusal(name, value, f"at least {least}")
    return value
