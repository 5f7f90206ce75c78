"""What is inside: the model's shape and size, the load of its experts and where they are, and the way of one token.

Legend: E experts · K experts per token
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from handful.cluster.keeper import Keeper
from handful.config import ModelConfig
from handful.cost import parameters
from handful.count import counted
from handful.engine import Delta, Request
from handful.experts.expert_file import Layout
from handful.experts.store import Store
from handful.model import Decoder
from handful.routing_options import RoutingOptions
from handful.sampling import Sampling
from handful.server.errors import invalid
from handful.server.load import LoadWatch
from handful.server.requests import experts_off
from handful.server.schema import PathBody

__all__ = ["experts_now", "model_facts", "path_of", "path_request"]

NEXT = 10  # of the most probable tokens that follow
GREEDY = Sampling(temperature=0)


def model_facts(name: str, model: Decoder, store: Store | None, layout: Layout | None = None) -> dict[str, Any]:
    """Its layers, experts, parameters and bytes; layout: of its experts, where they are not in the model."""
    config, router, whole = model.config, model.config.router, counted(model.config)
    return {
        "model": name,
        "context": config.context,
        "chat": model.tokenizer is not None and bool(model.tokenizer.chat_templates),
        "layers": config.layers,
        "moe_layers": list(config.moe_layers),
        "experts": 0 if router is None else router.experts,
        "top_k": 0 if router is None else router.top_k,
        "shared": bool(config.shared_width),
        "score": None if router is None else router.score,
        "parameters": {
            "total": parameters(whole).incl_all_embeddings,
            "active": parameters(whole, active=True).incl_all_embeddings,
        },
        "bytes": weight_bytes(model, layout if store is None else store.layout),
        "memory": None if store is None else {"slots": store.slots, "experts": store.layout.records},
    }


def weight_bytes(model: Decoder, layout: Layout | None = None) -> dict[str, int]:
    """Of all weights as they are held, in memory or in a pack, and of those that one token is multiplied by."""
    router, total, token = model.config.router, _nbytes(model), 0.0
    if model.head is not None:
        token -= _nbytes(model.embed)  # of which a token has a row
    experts = sum(_nbytes(layer.experts) for layer in model.moe_layers)
    if layout is not None:
        experts = layout.records * layout.record_bytes
        total += experts
    token += total - experts
    if router is not None:
        token += experts * router.top_k / router.experts
    return {"total": total, "token": round(token)}


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {*module.parameters(), *module.buffers()})


def experts_now(
    config: ModelConfig, load: LoadWatch, store: Store | None, keeper: Keeper | None = None
) -> dict[str, Any]:
    """Of every MoE layer, by its number: each expert's share of the last some ten thousand tokens' assignments, all 0
    where nothing was computed yet; of how many these are, older ones counting less; and with a store or ranks a letter
    for each, as `Store.places` and `Keeper.places` have them."""
    places: Sequence[str | None] = [None] * len(load.layers)
    if store is not None or keeper is not None:
        places = (store or keeper).places()  # type: ignore[union-attr]
    layers = {}
    for (layer, counts_E), where in zip(load.counts().items(), places, strict=True):
        assignments = float(counts_E.sum())
        shares = [round(count / max(assignments, 1), 6) for count in counts_E.tolist()]
        layers[str(layer)] = {"load": shares, "assignments": round(assignments, 1), "places": where}
    return {"layers": layers}


def path_request(body: PathBody, model: Decoder) -> Request:
    """The request whose first delta is the way of the last of some tokens."""
    options = RoutingOptions(record=True, experts_off=experts_off(body), top_k=body.top_k_experts)
    if model.config.router is None:
        if options.changes:
            raise invalid(
                "experts_off" if body.experts_off else "top_k_experts", "the model is dense, and has no router"
            )
        return Request(prompt=body.tokens, max_tokens=1, sampling=GREEDY, logprobs=NEXT)
    return Request(prompt=body.tokens, max_tokens=1, sampling=GREEDY, logprobs=NEXT, routing=options)


def path_of(delta: Delta, model: Decoder) -> dict[str, Any]:
    """In every MoE layer the router's scores of all experts, the chosen ones and their weights; and what may follow."""
    layers = []
    for layer, routing in zip(model.config.moe_layers, delta.routings, strict=True):  # none of a dense model
        computed_TK = routing.computed_TK
        layers.append(
            {
                "layer": layer,
                "scores": [round(score, 6) for score in routing.scores_TE[0].tolist()],
                "experts": routing.experts_TK[computed_TK].tolist(),
                "weights": [round(weight, 6) for weight in routing.weights_TK[computed_TK].tolist()],
            }
        )
    top = {} if delta.logprobs is None else delta.logprobs.top
    tokenizer = model.tokenizer
    following = [
        {
            "token": token,
            "text": None if tokenizer is None else tokenizer.token_bytes(token).decode("utf-8", "replace"),
            "probability": math.exp(value),
        }
        for token, value in top.items()
    ]
    return {"token": delta.job.request.prompt[-1], "layers": layers, "next": following}
