"""A rank: experts in a store, computed for whoever asks over a link.

As the store reads from a pack of all experts, any rank can compute any expert; those that it holds are there at once.

Legend: t tokens of a call · D model width · E experts · K experts per token
"""

from __future__ import annotations

import time

import torch

from handful.errors import RoutingError
from handful.experts.link import Call, Link, LinkError
from handful.experts.offload import OffloadedExperts
from handful.experts.store import Store
from handful.routing import Routing

__all__ = ["answer_calls", "compute"]


def compute(experts: OffloadedExperts, call: Call) -> torch.Tensor:
    """The rows of a call, of those assignments that are not -1."""
    dropped_TK = call.experts_TK < 0
    chosen_TK = call.experts_TK.clamp(min=0)
    if chosen_TK.numel() and int(chosen_TK.max()) >= experts.count:
        raise RoutingError(f"call names expert {int(chosen_TK.max())}: there are {experts.count}, counted from 0")
    scores_TE = torch.zeros(1, experts.count).expand(len(chosen_TK), experts.count)  # of which only the shape is used
    weights_TK = torch.zeros(1, 1).expand(chosen_TK.shape)
    return experts.rows(call.x_TD, Routing(scores_TE, scores_TE, chosen_TK, weights_TK, dropped_TK), call.tokens)


def answer_calls(link: Link, store: Store, *, activation: str, backend: str = "auto") -> None:
    """Compute what is asked until the link ends. What cannot be computed is told to who asked."""
    layers = [
        OffloadedExperts(store, i, activation=activation, backend=backend) for i in range(len(store.layout.layers))
    ]
    width = layers[0].width
    try:
        while True:
            call = link.next_call(len(layers), width)
            began = time.perf_counter_ns()
            try:
                with torch.inference_mode():
                    rows_ND = compute(layers[call.layer], call)
            except Exception as error:
                link.refuse(call.number, error)
            else:
                link.give(call.number, rows_ND, time.perf_counter_ns() - began)
    except LinkError:
        return
