"""DeepSeek's published balancing (EPLB), with its interface and its results.

Legend: L layers · E experts · R replicas (slots of all devices)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from handful.errors import ConfigError
from handful.placement.placement import Floats, Ints

__all__ = ["rebalance_experts"]


def rebalance_experts(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Expert parallelism load balancer (https://github.com/deepseek-ai/EPLB): hierarchical where the groups of experts
    can be dealt to the nodes, else over all devices at once.

    weight   (L, E): the load of every logical expert.

    Returns physical to logical (L, R), logical to physical (L, E, most copies; -1 where there is none) and the number
    of copies (L, E). ConfigError for numbers that do not divide.
    """
    layers, experts = weight.shape
    for name, whole, part in (
        ("experts", experts, num_groups),
        ("num_gpus", num_gpus, num_nodes),
        ("num_replicas", num_replicas, num_gpus),
    ):
        if part < 1 or whole % part:
            raise ConfigError(f"{name} = {whole}: a multiple of {part}")
    if num_replicas < experts:
        raise ConfigError(f"num_replicas = {num_replicas}: at least one for each of {experts} experts")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    physical = np.empty((layers, num_replicas), np.int64)
    counts = np.empty((layers, experts), np.int64)
    ranks = np.empty((layers, num_replicas), np.int64)
    for layer, load_E in enumerate(weight.float().cpu().numpy().astype(np.float64)):
        found = _rebalanced(load_E, num_replicas, num_groups, num_nodes, num_gpus)
        physical[layer], ranks[layer], counts[layer] = found
    logical = np.full((layers, experts, int(counts.max())), -1, np.int64)
    for layer in range(layers):
        logical[layer, physical[layer], ranks[layer]] = np.arange(num_replicas)
    return torch.from_numpy(physical), torch.from_numpy(logical), torch.from_numpy(counts)


def _rebalanced(load_E: Floats, replicas: int, groups: int, nodes: int, gpus: int) -> tuple[Ints, Ints, Ints]:
    """One layer: groups are packed to nodes, experts copied within a node, and the copies packed to its devices."""
    size, per_node = len(load_E) // groups, replicas // nodes
    members = np.arange(len(load_E)).reshape(groups, size)
    node_of, place_of = _packed(load_E.reshape(groups, size).sum(1), nodes)
    physical, ranks, counts = [], [], np.empty(len(load_E), np.int64)
    for node in range(nodes):
        own = np.flatnonzero(node_of == node)
        experts = members[own[np.argsort(place_of[own])]].reshape(-1)
        copied, rank, copies = _copied(load_E[experts], per_node)
        device, slot = _packed((load_E[experts] / copies)[copied], gpus // nodes)
        order = np.argsort(device * (per_node * nodes // gpus) + slot)
        physical.append(experts[copied[order]])
        ranks.append(rank[order])
        counts[experts] = copies
    return np.concatenate(physical), np.concatenate(ranks), counts


def _packed(load_N: Floats, packs: int) -> tuple[Ints, Ints]:
    """Items to packs of as many, the heaviest first, each to the lightest pack with room: the pack of each item, and
    its place in it."""
    room = len(load_N) // packs
    pack_N, place_N = np.arange(len(load_N)), np.zeros(len(load_N), np.int64)
    if room == 1:
        return pack_N, place_N
    # In float32 and by torch's sort, so that equal loads are taken in the published order.
    order = torch.from_numpy(load_N).float().sort(descending=True).indices.tolist()
    held, weighs = [0] * packs, [0.0] * packs
    for item in order:
        pack = min((p for p in range(packs) if held[p] < room), key=weighs.__getitem__)
        pack_N[item], place_N[item] = pack, held[pack]
        held[pack] += 1
        weighs[pack] += float(np.float32(load_N[item]))
    return pack_N, place_N


def _copied(load_E: Floats, replicas: int) -> tuple[Ints, Ints, Ints]:
    """Copies, each of the expert whose copies have the most: the expert of each, its number among them, and how many
    each expert has."""
    experts = len(load_E)
    copied, rank = np.arange(replicas), np.zeros(replicas, np.int64)
    counts = np.ones(experts, np.int64)
    for i in range(experts, replicas):
        busiest = int(np.argmax(load_E.astype(np.float32) / counts.astype(np.float32)))
        copied[i], rank[i] = busiest, counts[busiest]
        counts[busiest] += 1
    return copied, rank, counts
