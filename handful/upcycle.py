"""Upcycling: make an MoE from a trained dense model, in place of training one from nothing.

    copy       E copies of every feed-forward network behind a fresh router (Sparse Upcycling, Komatsuzaki et al.,
               arXiv:2212.05055). What copies answer is the same, so the MoE says what the dense model said.
    granular   the same, and every copy cut into G slices of its hidden width (Qwen1.5-MoE; the virtual groups of
               arXiv:2410.07524). A copy's slices have equal router rows, so at first they are chosen together.
    split      the dense network's own neurons dealt out to E experts, and a router fitted on text to send a token
               where its neurons are (MoEfication, arXiv:2110.01786; LLaMA-MoE, arXiv:2406.16554). No parameters are
               added but the routers'. With K < E the MoE is worse than the dense model until it is trained.

A gated network is a sum over its hidden neurons, so a network cut into slices of neurons is the sum of the slices. An
MoE weighs what it sums, and with K chosen experts of even weight every weight is 1/K: what must be whole again is
multiplied by that many in `down`, where every family can write it.

Legend: B sequences · S tokens in one · T = B·S · D width · F hidden width of the dense network · f of an expert ·
E experts · K experts per token · C copies · G slices of a copy · R = 2·F gate and up rows (F without a gate)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from handful.config import ModelConfig, RouterConfig
from handful.cost import cost
from handful.data import Data, bits_per_byte, heldout_batches
from handful.errors import ConfigError
from handful.evaluate import evaluate
from handful.experts import FeedForward, activate
from handful.families import config_to_hf, why_not_public
from handful.families.weights import shapes
from handful.meta_device import meta_device
from handful.model import Decoder

__all__ = ["Method", "Partition", "Report", "Side", "check_upcycle", "report", "upcycle"]

Method = Literal["copy", "granular", "split"]
Partition = Literal["coactivation", "weights", "random"]
Progress = Callable[[int, int], None]  # (layers done, layers)

ROUNDS = 10  # of k-means
RIDGE = 1e-2  # of the mean square of a router's input
LOGIT_STD = 0.01  # of a fitted router: weights within a few percent of each other; more spread loses more


def upcycle(
    model: Decoder,
    method: Method = "copy",
    *,
    experts: int = 8,
    top_k: int | None = None,
    slices: int | None = None,
    noise: float = 0.0,
    partition: Partition | None = None,
    text_BS: Tensor | None = None,
    seed: int = 0,
    backend: str = "auto",
    progress: Progress | None = None,
) -> Decoder:
    """An MoE made from a dense decoder, which stays as it is; every layer becomes an MoE layer.

    experts     copies of each feed-forward network, or (split) the experts that it is cut into.
    top_k       copies, or experts, of a token. None: 2 copies; of a split three quarters of the experts (6 of 8), for
                with fewer the model is hardly one any more.
    slices      G of granular: there are experts x G experts of width F / G, and top_k x G of a token.
    noise       copy, granular: normal noise on every copy, as a share of the root mean square of its weights.
    partition   split: neurons that are active on the same tokens together ("coactivation", the default), those of
                alike gate and up rows ("weights"), or "random".
    text_BS     split: tokens of ordinary text, on which neurons are watched and the routers fitted; all go through
                the model at once. Not needed where top_k = experts and the partition does not look at text.
    seed        of the routers, the noise and the partition.

    Copies without noise give the dense model's logits, up to the rounding of weights that sum to 1. The tokenizer and
    the dtype are the dense model's. ConfigError names an argument that does not fit the model.
    """
    dense = model.config
    if model.state_dict().keys() != shapes(dense).keys():
        raise ConfigError("upcycle model: its weights are quantized: load it without")
    top_k, slices = check_upcycle(
        dense, method, experts=experts, top_k=top_k, slices=slices, noise=noise, partition=partition
    )
    watched = (partition or "coactivation") == "coactivation"
    if method == "split" and text_BS is None and (top_k < experts or watched):
        raise ConfigError("upcycle text = None: tokens to fit the routers on")
    if method == "split":
        router = RouterConfig(experts=experts, top_k=top_k)
        width, copies = dense.ffn // experts, 1
    else:
        router = RouterConfig(experts=experts * slices, top_k=top_k * slices)
        width, copies = dense.ffn // slices, experts
    config = replace(dense, router=router, expert_width=width, ffn=0)
    draw = torch.Generator().manual_seed(seed % (1 << 63))

    state = {name: t.clone() for name, t in model.state_dict().items() if ".ffn." not in name}

    def convert(layer: int, x_TD: Tensor | None) -> None:
        ffn = _ffn(model, layer)
        if method == "split":
            parts_Ef, router_ED = _fit(ffn, x_TD, experts, top_k, partition or "coactivation", draw)
            scale = float(top_k)
        else:
            parts_Ef = torch.arange(dense.ffn).view(slices, width)
            router_ED = torch.randn(copies, dense.width, generator=draw).mul_(dense.width**-0.5)
            # Equal rows give equal scores, so the best K·G experts are all the slices of the K best copies.
            router_ED = router_ED.repeat_interleave(slices, 0)
            scale = float(slices)
        tensors = {"router.weight": router_ED, **_experts(ffn, parts_Ef, copies, scale)}
        for name, tensor in tensors.items():
            if noise and name.startswith("experts."):
                drawn = torch.randn(tensor.shape, generator=draw) * tensor.float().square().mean().sqrt().item()
                tensor = tensor + (noise * drawn).to(tensor)
            state[f"layers.{layer}.ffn.{name}"] = tensor.to(ffn.down.weight)
        if progress is not None:
            progress(layer + 1, dense.layers)

    with torch.no_grad():
        if method == "split" and text_BS is not None:
            _each_ffn_input(model, text_BS, convert)
        else:
            for layer in range(dense.layers):
                convert(layer, None)
    with meta_device():
        made = Decoder(config, backend=backend)
    made.load_state_dict(state, strict=True, assign=True)
    made.tokenizer, made.origin = model.tokenizer, model.origin
    return made.eval()


def check_upcycle(
    dense: ModelConfig,
    method: Method = "copy",
    *,
    experts: int = 8,
    top_k: int | None = None,
    slices: int | None = None,
    noise: float = 0.0,
    partition: Partition | None = None,
) -> tuple[int, int]:
    """top_k and slices, as `upcycle` takes them, from the config alone. ConfigError for what does not go together."""

    def need(ok: bool, name: str, value: Any, right: str) -> None:
        if not ok:
            raise ConfigError(f"upcycle {name} = {value!r}: {right}")

    if dense.router is not None:
        raise ConfigError("upcycle model: it is an MoE already; a dense model is needed")
    need(method in get_args(Method), "method", method, f"one of {', '.join(get_args(Method))}")
    need(experts >= 2, "experts", experts, "at least 2")
    if top_k is None:
        top_k = max(1, 3 * experts // 4) if method == "split" else 2
    need(1 <= top_k <= experts, "top_k", top_k, f"from 1 to experts = {experts}")
    need(method == "granular" or slices is None, "slices", slices, f"for the method granular, not {method}")
    need(method != "split" or noise == 0, "noise", noise, "for the methods copy and granular, not split")
    need(0 <= noise < math.inf, "noise", noise, "at least 0")
    need(method == "split" or partition is None, "partition", partition, f"for the method split, not {method}")
    need(partition is None or partition in get_args(Partition), "partition", partition, f"one of {_PARTITIONS}")
    if method == "split":
        need(dense.ffn % experts == 0, "experts", experts, f"a divisor of the hidden width, {dense.ffn}")
        return top_k, 1
    if method == "granular":
        slices = 2 if slices is None else slices
        need(slices >= 2, "slices", slices, "at least 2 (with 1 it is the method copy)")
        need(dense.ffn % slices == 0, "slices", slices, f"a divisor of the hidden width, {dense.ffn}")
        return top_k, slices
    need(top_k >= 2, "top_k", top_k, "at least 2: one expert's weight is always 1, and no text would reach the router")
    return top_k, 1


_PARTITIONS = ", ".join(get_args(Partition))


def _ffn(model: Decoder, layer: int) -> FeedForward:
    ffn = model.layers[layer].ffn
    assert isinstance(ffn, FeedForward)
    return ffn


def _experts(ffn: FeedForward, parts_Gf: Tensor, copies: int, scale: float) -> dict[str, Tensor]:
    """The slices of a dense network by their neurons, all of them `copies` times, `down` multiplied by `scale`."""
    D, F = ffn.down.weight.shape
    rows_rFD = ffn.gate_up.weight.view(-1, F, D)  # gate and up, or up alone
    gate_up_GRD = rows_rFD[:, parts_Gf].transpose(0, 1).reshape(len(parts_Gf), -1, D)
    down_GDf = ffn.down.weight[:, parts_Gf].transpose(0, 1) * scale
    return {"experts.gate_up": gate_up_GRD.repeat(copies, 1, 1), "experts.down": down_GDf.repeat(copies, 1, 1)}


# ---------------------------------------------------------------------------------------------------------------------
# Split: which neurons stand together, and who is sent to them.


def _each_ffn_input(model: Decoder, tokens_BS: Tensor, visit: Callable[[int, Tensor], None]) -> None:
    """Call `visit(layer, x_TD)` with what each feed-forward network is given, as the tokens go through the model."""

    def hook(layer: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda module, given: visit(layer, given[0].flatten(0, 1).float())

    handles = [_ffn(model, i).register_forward_pre_hook(hook(i)) for i in range(model.config.layers)]
    try:
        model.hidden_states(tokens_BS.to(model.embed.weight.device))
    finally:
        for handle in handles:
            handle.remove()


def _fit(
    ffn: FeedForward, x_TD: Tensor | None, experts: int, top_k: int, partition: Partition, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The neurons of each expert (E, f), and a router (E, D)."""
    gate_up_RD, down_DF = ffn.gate_up.weight.float(), ffn.down.weight.float()
    D, F = down_DF.shape
    h_TF = None if x_TD is None else activate(x_TD @ gate_up_RD.mT, ffn.activation)
    if partition == "random":
        parts_Ef = torch.randperm(F, generator=draw).view(experts, -1)
    elif partition == "weights":
        features_FR = gate_up_RD.view(-1, F, D).transpose(0, 1).flatten(1)
        parts_Ef = balanced_clusters(features_FR, experts, draw)
    else:
        assert h_TF is not None
        # What a neuron adds to the stream, by size: the pattern over tokens says which neurons work together.
        parts_Ef = balanced_clusters((h_TF.abs() * down_DF.norm(dim=0)).mT, experts, draw)
    if top_k == experts or x_TD is None or h_TF is None:
        return parts_Ef, torch.zeros(experts, D)  # all are chosen, with even weights
    energy_TE = torch.stack([(h_TF[:, part] @ down_DF[:, part].mT).square().sum(1) for part in parts_Ef], 1)
    return parts_Ef, fit_router(x_TD, energy_TE)


def fit_router(x_TD: Tensor, energy_TE: Tensor) -> Tensor:
    """A router (E, D) whose logits rank experts by their share in the energy of what all would answer: by ridge
    regression on the share's root.

    The logits are made small, so that the chosen weights are near even: what an expert answers counts in full.
    """
    target_TE = (energy_TE / energy_TE.sum(1, keepdim=True).clamp_min(1e-20)).sqrt()
    target_TE = target_TE - target_TE.mean(1, keepdim=True)
    x_TD, target_TE = x_TD.double(), target_TE.double()
    square_DD = x_TD.mT @ x_TD
    square_DD.diagonal().add_(RIDGE * float(square_DD.diagonal().mean()))
    router_ED: Tensor = torch.linalg.solve(square_DD, x_TD.mT @ target_TE).mT
    spread = float((x_TD @ router_ED.mT).std(1).mean())
    router_ED *= LOGIT_STD / max(spread, 1e-12)
    return router_ED.float()


def balanced_clusters(features_Fn: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    """Cut F points into clusters of F / clusters points each, alike by direction: k-means with a balanced assignment.

    Returns the points of each cluster, (clusters, F / clusters).
    """
    points_Fn = torch.nn.functional.normalize(features_Fn, dim=1)
    size = len(points_Fn) // clusters
    start = torch.randperm(len(points_Fn), generator=draw)[:clusters].to(points_Fn.device)
    centres_En = points_Fn[start]
    owner_F = torch.full((len(points_Fn),), -1)
    for _ in range(ROUNDS):
        before_F, owner_F = owner_F, balanced_assignment(1 - points_Fn @ centres_En.mT, size)
        if torch.equal(before_F, owner_F):
            break
        sums_En = torch.zeros_like(centres_En).index_add_(0, owner_F, points_Fn)
        centres_En = torch.nn.functional.normalize(sums_En, dim=1)
    return owner_F.argsort(stable=True).view(clusters, size)


def balanced_assignment(cost_FE: Tensor, size: int) -> Tensor:
    """A cluster for every point, (F,), `size` points to each of the E: in rounds, every free point asks for its
    cheapest cluster with room, and each cluster takes the cheapest that ask."""
    F, E = cost_FE.shape
    owner_F = torch.full((F,), -1, device=cost_FE.device)
    cost_FE = cost_FE.clone()
    # A round in which some point is turned away fills a cluster: there are at most E.
    for _ in range(E):
        free_n = (owner_F < 0).nonzero().squeeze(1)
        if not len(free_n):
            break
        wish_n = cost_FE[free_n].argmin(1)
        for e in wish_n.unique().tolist():
            room = size - int((owner_F == e).sum())
            asking_n = free_n[wish_n == e]
            owner_F[asking_n[cost_FE[asking_n, e].argsort(stable=True)[:room]]] = e
            if len(asking_n) >= room:
                cost_FE[:, e] = math.inf
    return owner_F


# ---------------------------------------------------------------------------------------------------------------------
# Before and after.


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model's parameters and its held-out loss (nats per token, bits per byte), None where no text was given."""

    total_parameters: int
    active_parameters: int
    loss: float | None
    bits_per_byte: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The dense model and the mixture made from it, on the same held-out text.

    written_as       the public family that the mixture is written as, or "handful".
    why_not_public   where it is "handful": what stands in the way.
    """

    before: Side
    after: Side
    written_as: str
    why_not_public: str | None


def report(
    dense: Decoder, made: Decoder, data: Data | None, *, context: int = 512, tokens: int = 65536, batch: int = 8
) -> Report:
    """What upcycling made of a model: parameters, and losses on at most `tokens` tokens of the held-out part of the
    text, in sequences of `context`. DataError if the text is too short for one."""

    def side(model: Decoder) -> Side:
        price = cost(model.config)
        loss = bits = None
        if data is not None:
            loss = evaluate(model, heldout_batches(data.heldout, batch, context, tokens))
            bits = bits_per_byte(loss, data.evaluated_bytes_per_token(context, tokens))
        return Side(total_parameters=price.total, active_parameters=price.active, loss=loss, bits_per_byte=bits)

    return Report(
        before=side(dense),
        after=side(made),
        written_as=config_to_hf(made.config)["model_type"],
        why_not_public=why_not_public(made.config),
    )
