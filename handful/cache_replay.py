"""What a cache of experts would have done with a recorded routing, beside the best that any could do.

    replay(recording, capacity) -> Replay     hit rates of a policy and of the optimum

Legend: T tokens · E experts · K experts per token
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from handful.config import EncoderDecoderConfig, ModelConfig
from handful.count import Counted, counted
from handful.errors import ConfigError
from handful.experts.cache import Call, belady, simulate
from handful.experts.store import DEFAULT_POLICY
from handful.observe import Recording

__all__ = ["Replay", "check_recording", "replay"]

USES = 2_000_000  # of experts, that are played


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a cache would have done with a recorded routing, token by token, from empty.

    tokens     of the recording, that were played: its first ones.
    capacity   experts that it holds.
    hit_rate   of the policy; best: of one who knows the future (Belady 1966), which no policy exceeds.
    """

    policy: str
    tokens: int
    capacity: int
    hit_rate: float
    best: float


def replay(recording: Recording, capacity: int, *, policy: str = DEFAULT_POLICY) -> Replay:
    """Play a recording through a cache of `capacity` experts, shared by all layers as in `handful.experts.store`.

    Every token is taken for one that decodes alone. No more tokens are played than there is time for in about ten
    seconds: two million uses of experts. ConfigError for another policy, no capacity or an empty recording.
    """
    if capacity < 1:
        raise ConfigError(f"capacity = {capacity}: at least 1 expert")
    if not len(recording) or not recording.tokens:
        raise ConfigError("trace: it holds no token's routing")
    uses = sum(layer.shape[1] for layer in recording.experts_TK)
    tokens = min(recording.tokens, max(1, USES // uses))
    calls = list(_calls(recording, tokens))
    count = sum(len(call.counts) for call in calls)

    def share(found: list[list[bool]]) -> float:
        return sum(map(sum, found)) / count

    return Replay(
        policy=policy,
        tokens=tokens,
        capacity=capacity,
        hit_rate=share(simulate(policy, calls, capacity)),
        best=share(belady(calls, capacity)),
    )


def check_recording(recording: Recording, model: ModelConfig | EncoderDecoderConfig | Counted, name: str) -> None:
    """ConfigError unless a recording can be of this model."""
    model = counted(model)
    routed = [weights for weights in model.weights if weights.part == "routed_experts"]
    experts = max((weights.copies for weights in routed), default=0)
    layers, top_k = model.moe_layers, max((weights.active for weights in routed), default=0)
    chosen = max((layer.shape[1] for layer in recording.experts_TK), default=0)
    largest = max((int(layer.max()) for layer in recording.experts_TK if layer.numel()), default=-1)
    if (len(recording), chosen) != (layers, top_k) or largest >= experts:
        raise ConfigError(
            f"trace = {name!r}: of {len(recording)} MoE layers with {chosen} experts a token, the highest {largest}: "
            f"the model has {layers}, with {top_k} of {experts}"
        )


def _calls(recording: Recording, tokens: int) -> Iterator[Call]:
    """What is needed together: a token's experts of a layer."""
    layers = [layer[:tokens].tolist() for layer in recording.experts_TK]
    for token in range(tokens):
        for layer, chosen_TK in enumerate(layers):
            yield Call(layer, 1, dict.fromkeys(chosen_TK[token], 1))
