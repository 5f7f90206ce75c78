"""A model to be looked at: our decoder, or one of transformers by the plug-in, behind one set of calls.

Legend: B windows · S tokens of one · T = B·S tokens · D model width · E experts · K experts per token · V vocabulary
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from handful.block import Block
from handful.encoder_decoder import EncoderDecoder
from handful.errors import ConfigError
from handful.model import Decoder
from handful.moe import MoE
from handful.positions import Span
from handful.routing import Limits, Routing
from handful.text import Tokenizer

__all__ = ["Borrowed", "Ours", "Stage", "Subject", "subject_of"]

CHUNK = 1 << 22  # logits held at once


@dataclass(frozen=True, eq=False)
class Stage:
    """A batch of windows that has reached a layer's experts, with all experts on.

    nats_BS   of the targets; chosen_TK, the experts there; x_BSD, what they are given and added to, and after_BSD, the
              sum, where the model can go on from the middle.
    """

    layer: int
    tokens_BS: Tensor
    targets_BS: Tensor
    nats_BS: Tensor
    chosen_TK: Tensor
    x_BSD: Tensor | None = None
    after_BSD: Tensor | None = None


class Subject(Protocol):
    """What inspection asks of a model.

    layers    a name for each MoE layer; experts, how many it has; top_k, how many a token uses.
    removal   what is done for a token whose expert is off: "replaced", the next best one is taken, or "removed", the
              expert's output is left out and nothing takes its place.
    """

    tokenizer: Tokenizer
    layers: list[str]
    experts: list[int]
    top_k: list[int]
    context: int
    removal: str

    def run(self, tokens_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The nats of every target, (B, S) float32, and each layer's (T, K) experts (-1: not computed), on the CPU."""
        ...

    def before(self, tokens_BS: Tensor, targets_BS: Tensor, layer: int) -> Stage:
        """A batch up to the experts of a layer, from where `without` goes on."""
        ...

    def without(self, stage: Stage, experts: Sequence[int]) -> Tensor:
        """The nats of every target with these experts of the stage's layer off, less those with all: (B, S), CPU."""
        ...

    def seen(self, tokens_BS: Tensor) -> list[Tensor]:
        """What each layer's experts are given, (T, D)."""
        ...

    def output(self, layer: int, expert: int, x_TD: Tensor) -> Tensor:
        """One expert's output for T inputs, (T, D), unweighted."""
        ...


def subject_of(model: Any, tokenizer: Tokenizer | None = None, name: str = "model") -> Subject:
    """A loaded model as a subject. ConfigError for one without experts, without a tokenizer, or that is no decoder."""
    if isinstance(model, Decoder):
        return Ours(model, tokenizer or model.tokenizer, name)
    if isinstance(model, EncoderDecoder):
        raise ConfigError(f"{name}: an encoder-decoder; inspect is for decoders")
    if isinstance(model, nn.Module) and hasattr(getattr(model, "config", None), "get_text_config"):
        return Borrowed(model, tokenizer, name)
    raise ConfigError(f"{name}: a {type(model).__name__}; inspect is for decoders, ours or those of transformers")


def _needs_tokenizer(tokenizer: Tokenizer | None, name: str) -> Tokenizer:
    if tokenizer is None:
        raise ConfigError(f"{name}: it has no tokenizer.json, which the text is read by")
    return tokenizer


class Ours:
    """A `Decoder`."""

    removal = "replaced"

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None, name: str) -> None:
        router = model.config.router
        if router is None or not model.moe_layers:
            raise ConfigError(f"{name}: a dense model; inspect is for mixtures of experts")
        self.tokenizer = _needs_tokenizer(tokenizer, name)
        self.model = model.eval()
        self.places = [i for i, block in enumerate(model.layers) if isinstance(block.ffn, MoE)]
        self.layers = [str(i) for i in self.places]
        self.experts = [router.experts] * len(self.layers)
        self.top_k = [router.top_k] * len(self.layers)
        self.context = model.config.context
        limited = router.eval_capacity_factor or router.sequence_capacity
        self._free = router.choice == "token" and router.top_groups == router.groups and not limited

    @torch.no_grad()
    def run(self, tokens_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        x_BSD, routings = self.model.hidden_states(tokens_BS.to(self.model.embed.weight.device))
        return self._nats(x_BSD, targets_BS), [_computed(routing) for routing in routings]

    def _nats(self, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        targets_T = targets_BS.flatten().to(x_BSD.device)
        nats_T = _nats(x_BSD.flatten(0, -2), targets_T, self.model.config.vocab, self.model.logits)
        return nats_T.view(targets_BS.shape).cpu()

    @torch.no_grad()
    def before(self, tokens_BS: Tensor, targets_BS: Tensor, layer: int) -> Stage:
        model = self.model
        x_BSD = model.embed(tokens_BS.to(model.embed.weight.device))
        if model.config.embedding_scale != 1:
            x_BSD = x_BSD * model.config.embedding_scale
        block, span = model.layers[self.places[layer]], self._span(x_BSD)
        assert isinstance(block, Block)
        for earlier in model.layers[: self.places[layer]]:
            x_BSD, _ = earlier(x_BSD, span)
        x_BSD = x_BSD + block.scaled(block.attn(block.attn_norm(x_BSD), span))
        y_BSD, routing = block.ffn(block.ffn_norm(x_BSD))
        after_BSD = x_BSD + block.scaled(y_BSD)
        nats_BS = self._nats(self._onward(after_BSD, layer), targets_BS)
        return Stage(layer, tokens_BS, targets_BS, nats_BS, _computed(routing), x_BSD, after_BSD)

    def _span(self, x_BSD: Tensor) -> Span:
        return Span.of(self.model.config, x_BSD.shape[1], None, None, x_BSD.device)

    def _onward(self, x_BSD: Tensor, layer: int) -> Tensor:
        """From behind a layer's experts to what the output layer is given."""
        model = self.model
        for later in model.layers[self.places[layer] + 1 :]:
            x_BSD, _ = later(x_BSD, self._span(x_BSD))
        x_BSD = model.norm(x_BSD)
        return x_BSD if model.config.logits_scale == 1 else x_BSD / model.config.logits_scale

    @torch.no_grad()
    def without(self, stage: Stage, experts: Sequence[int]) -> Tensor:
        x_BSD, after_BSD, layer = stage.x_BSD, stage.after_BSD, stage.layer
        assert x_BSD is not None
        assert after_BSD is not None
        off_E = torch.zeros(self.experts[layer], dtype=torch.bool, device=x_BSD.device)
        off_E[list(experts)] = True
        more_BS = torch.zeros(stage.targets_BS.shape)
        # Where each token chooses for itself, only those that chose an expert that is off choose anew.
        hit_BS = torch.isin(stage.chosen_TK, torch.tensor(list(experts), dtype=stage.chosen_TK.dtype)).any(1)
        hit_BS = hit_BS.view(more_BS.shape) if self._free else torch.ones(more_BS.shape, dtype=torch.bool)
        if not bool(hit_BS.any()):
            return more_BS
        block = self.model.layers[self.places[layer]]
        assert isinstance(block, Block)
        at_BS = hit_BS.to(x_BSD.device)
        x_TD = x_BSD[at_BS] if self._free else x_BSD
        y_TD, _ = block.ffn(block.ffn_norm(x_TD), Limits(off_E))
        if self.places[layer] == len(self.model.layers) - 1 and self._free:
            now_T = self._nats(self._onward(x_TD + block.scaled(y_TD), layer), stage.targets_BS[hit_BS])
            more_BS[hit_BS] = now_T - stage.nats_BS[hit_BS]
            return more_BS
        changed_BSD = after_BSD.clone()
        changed_BSD[at_BS] = (x_TD + block.scaled(y_TD)).flatten(0, -2)
        some_B = hit_BS.any(1)
        now_BS = self._nats(self._onward(changed_BSD[some_B.to(x_BSD.device)], layer), stage.targets_BS[some_B])
        more_BS[some_B] = now_BS - stage.nats_BS[some_B]
        return more_BS

    @torch.no_grad()
    def seen(self, tokens_BS: Tensor) -> list[Tensor]:
        with _inputs([moe.experts for moe in self.model.moe_layers]) as inputs:
            self.model.hidden_states(tokens_BS.to(self.model.embed.weight.device))
        return [torch.cat(inputs[layer]) for layer in range(len(self.layers))]

    @torch.no_grad()
    def output(self, layer: int, expert: int, x_TD: Tensor) -> Tensor:
        even_TE = x_TD.new_ones(()).expand(len(x_TD), self.experts[layer])
        experts_T1 = torch.full((len(x_TD), 1), expert, device=x_TD.device)
        weights_T1 = torch.ones(len(x_TD), 1, device=x_TD.device)
        y_TD: Tensor = self.model.moe_layers[layer].experts(x_TD, Routing(even_TE, even_TE, experts_T1, weights_T1))
        return y_TD


class Borrowed:
    """A model of transformers whose experts the plug-in reaches (`handful.transformers`), whoever computes them.

    Its routers cannot be told to do without an expert, so the output of one that is off is multiplied by 0.
    """

    removal = "removed"

    def __init__(self, model: Any, tokenizer: Tokenizer | None, name: str) -> None:
        from handful.transformers import experts_of

        if getattr(model.config, "is_encoder_decoder", False):
            raise ConfigError(f"{name}: an encoder-decoder; inspect is for decoders")
        self.tokenizer = _needs_tokenizer(tokenizer, name)
        self.model = model.eval()
        self.modules = experts_of(model)
        text = model.config.get_text_config()
        self.context = int(getattr(text, "max_position_embeddings", 2048))
        self.vocab = int(text.vocab_size)
        if self.tokenizer.vocab_size > self.vocab:
            raise ConfigError(f"{name}: its tokenizer has {self.tokenizer.vocab_size} tokens, the model {self.vocab}")
        self.device = next(model.parameters()).device
        # Layers that text does not pass (a vision tower's) are none of it.
        two = torch.full((1, 2), self.tokenizer.eos_id)
        routings = self._watched(two)
        self.modules = {layer: self.modules[layer] for layer in routings}
        self.layers = [layer_name(layer) for layer in routings]
        self.experts = [routing.experts for routing in routings.values()]
        self.top_k = [routing.top_k for routing in routings.values()]

    @torch.no_grad()
    def _watched(self, tokens_BS: Tensor) -> dict[str, Routing]:
        from handful.transformers import watch

        with watch(self.model, tokens=1) as seen:
            self._logits(tokens_BS)
        return {layer: seen.steps[-1][layer] for layer in seen.layers if layer in seen.steps[-1]}

    def _logits(self, tokens_BS: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens_BS.to(self.device), use_cache=False).logits
        return logits

    @torch.no_grad()
    def run(self, tokens_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        from handful.transformers import watch

        with watch(self.model, tokens=1) as seen:
            nats_BS = self._nats(tokens_BS, targets_BS)
        return nats_BS, [_computed(seen.steps[-1][layer]) for layer in self.modules]

    def _nats(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        logits_TV = self._logits(tokens_BS).flatten(0, 1)
        nats_T = _nats(logits_TV, targets_BS.flatten().to(self.device), self.vocab, lambda logits: logits)
        return nats_T.view(targets_BS.shape).cpu()

    def before(self, tokens_BS: Tensor, targets_BS: Tensor, layer: int) -> Stage:
        nats_BS, experts = self.run(tokens_BS, targets_BS)
        return Stage(layer, tokens_BS, targets_BS, nats_BS, experts[layer])

    @torch.no_grad()
    def without(self, stage: Stage, experts: Sequence[int]) -> Tensor:
        more_BS = torch.zeros(stage.targets_BS.shape)
        hit_TK = torch.isin(stage.chosen_TK, torch.tensor(list(experts), dtype=stage.chosen_TK.dtype))
        some_B = hit_TK.any(1).view(more_BS.shape).any(1)
        if bool(some_B.any()):
            with self._silent(stage.layer, experts):
                now_BS = self._nats(stage.tokens_BS[some_B], stage.targets_BS[some_B])
            more_BS[some_B] = now_BS - stage.nats_BS[some_B]
        return more_BS

    @contextlib.contextmanager
    def _silent(self, layer: int, experts: Sequence[int]) -> Iterator[None]:
        def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x_TD, experts_TK, weights_TK = (*args, *kwargs.values())
            off_TK = torch.isin(experts_TK, torch.tensor(list(experts), device=experts_TK.device))
            return (x_TD, experts_TK, weights_TK.masked_fill(off_TK, 0)), {}

        hook = list(self.modules.values())[layer].register_forward_pre_hook(see, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def seen(self, tokens_BS: Tensor) -> list[Tensor]:
        with _inputs(list(self.modules.values())) as inputs:
            self._logits(tokens_BS)
        return [torch.cat(inputs[layer]) for layer in range(len(self.layers))]

    @torch.no_grad()
    def output(self, layer: int, expert: int, x_TD: Tensor) -> Tensor:
        experts_T1 = torch.full((len(x_TD), 1), expert, device=x_TD.device)
        weights_T1 = torch.ones(len(x_TD), 1, device=x_TD.device, dtype=x_TD.dtype)
        y_TD: Tensor = list(self.modules.values())[layer](x_TD, experts_T1, weights_T1)
        return y_TD


def layer_name(module: str) -> str:
    """The number in a module's name: "3" of "model.layers.3.mlp.experts"; the name where it has not just one."""
    numbers = [part for part in module.split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else module


def _nats(x_TD: Tensor, targets_T: Tensor, vocab: int, logits: Callable[[Tensor], Tensor]) -> Tensor:
    step = max(1, CHUNK // vocab)
    parts = [
        nn.functional.cross_entropy(logits(x).float(), targets, reduction="none")
        for x, targets in zip(x_TD.split(step), targets_T.split(step), strict=True)
    ]
    return torch.cat(parts)


def _computed(routing: Routing) -> Tensor:
    """(T, K) the experts, best first, -1 where one was not computed, in as few bytes as they need."""
    experts_TK = routing.experts_TK
    if routing.dropped_TK is not None:
        experts_TK = experts_TK.masked_fill(routing.dropped_TK, -1)
        # Where experts choose their tokens, a token's stand in the order of their numbers.
        best_TK = routing.weights_TK.masked_fill(routing.dropped_TK, -math.inf).sort(-1, descending=True).indices
        experts_TK = experts_TK.gather(-1, best_TK)
    return experts_TK.to("cpu", torch.int16)


@contextlib.contextmanager
def _inputs(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """What each of some modules is given first, call after call."""
    found: list[list[Tensor]] = [[] for _ in modules]

    def keep(place: int) -> Callable[..., None]:
        def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[place].append(next(iter((*args, *kwargs.values()))).detach())

        return see

    hooks = [module.register_forward_pre_hook(keep(place), with_kwargs=True) for place, module in enumerate(modules)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
