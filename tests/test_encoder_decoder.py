"""The encoder-decoder alone: buckets by hand, attention against a plain rewrite, cache, padding, causality, training.

Legend: B batch · S input tokens · O output tokens · D width · H heads · V vocabulary
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import SWITCH
from torch import Tensor

from handful.balance import switch_loss, z_loss
from handful.config import EncoderDecoderConfig, RouterConfig
from handful.config_io import from_dict, to_dict
from handful.encoder_decoder import EncoderDecoder, OutputCache, T5Attention, bucket
from handful.errors import ConfigError
from handful.moe import MoE

F64 = torch.float64


def model(seed: int = 0, **changes: Any) -> EncoderDecoder:
    torch.manual_seed(seed)
    return EncoderDecoder(replace(SWITCH, **changes)).to(F64).eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, SWITCH.vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, right: Tensor) -> bool:
    return float((found - right).norm() / right.norm()) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# Positions and attention.


def test_buckets_by_hand() -> None:
    # Eight buckets up to 16: 0, 1, 2, 3 one each, then from 4 · 4^(j / 4): 4, 5.66, 8, 11.3.
    back = torch.arange(0, -40, -1)
    one_way = bucket(back, 8, 16, both_ways=False).tolist()
    assert one_way == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6] + [7] * 28
    # Four each way up to 9: 0 and 1 alone, then from 2 and from 4.24; ahead stands behind the first four.
    looking_back = bucket(back, 8, 9, both_ways=True).tolist()
    assert looking_back == [0, 1, 2, 2, 2] + [3] * 35
    assert bucket(-back, 8, 9, both_ways=True).tolist() == [0, *(4 + b for b in looking_back[1:])]
    assert bucket(-back, 8, 16, both_ways=False).tolist() == [0] * 40


@torch.no_grad()
def test_attention_against_a_plain_rewrite() -> None:
    torch.manual_seed(0)
    attention = T5Attention(SWITCH).to(F64)
    x_OD, y_SD = torch.randn(3, 8, dtype=F64), torch.randn(4, 8, dtype=F64)
    bias_HOS = torch.randn(2, 3, 4, dtype=F64)
    q, k, v = x_OD @ attention.q.weight.t(), y_SD @ attention.k.weight.t(), y_SD @ attention.v.weight.t()
    out = torch.zeros(3, 10, dtype=F64)
    for h in range(2):
        mine = slice(5 * h, 5 * h + 5)
        for o in range(3):
            scores = [math.exp(float(q[o, mine] @ k[s, mine] + bias_HOS[h, o, s])) for s in range(4)]
            out[o, mine] = sum(score / sum(scores) * v[s, mine] for s, score in enumerate(scores))
    found = attention(x_OD[None], attention.keys_values(y_SD[None]), bias_HOS[None])[0]
    assert close(found, out @ attention.o.weight.t())


# ---------------------------------------------------------------------------------------------------------------------
# The model.


@torch.no_grad()
def test_routings_are_the_encoders_and_then_the_decoders() -> None:
    net = model()
    _, routings = net(tokens(2, 5), tokens(2, 4))
    assert [routing.tokens for routing in routings] == [10, 8, 8, 8]
    assert [block.ffn in net.moe_layers for block in net.encoder.layers] == [False, True]
    assert len(net.moe_layers) == 4
    seen: list[MoE] = []
    hooks = [moe.register_forward_hook(lambda moe, _i, _o: seen.append(moe)) for moe in net.moe_layers]
    net(tokens(2, 5), tokens(2, 4))
    assert seen == net.moe_layers
    assert len(hooks) == 4


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_decoding_with_a_cache_is_the_full_pass(tied: bool) -> None:
    net = model(tied=tied)
    inputs_BS, outputs_BO, mask_BS = tokens(3, 6), tokens(3, 9, seed=1), torch.ones(3, 6)
    mask_BS[1, 4:], mask_BS[2, :2] = 0, 0
    full_BOV, _ = net(inputs_BS, outputs_BO, mask_BS=mask_BS)
    encoded = net.encode(inputs_BS, mask_BS)
    cache = OutputCache(net.config, 3, 9, dtype=F64)
    parts = []
    for piece in outputs_BO.split([1, 3, 1, 4], dim=1):
        parts.append(net.decode(piece, encoded, cache)[0])
        # The encoded inputs were read by the first call, and by no other.
        encoded = replace(encoded, x_BSD=torch.full_like(encoded.x_BSD, math.nan))
    assert close(torch.cat(parts, dim=1), full_BOV)
    assert cache.length == 9
    with pytest.raises(ConfigError, match="cache holds 9 outputs of at most 9: 1 more do not fit"):
        net.decode(outputs_BO[:, :1], encoded, cache)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    net = model()
    inputs_1S, outputs_1O = tokens(1, 5), tokens(1, 4, seed=1)
    right, _ = net(inputs_1S, outputs_1O)
    for front in (0, 2, 3):
        padded = torch.cat([torch.zeros(1, front).long(), inputs_1S, torch.zeros(1, 3 - front).long()], dim=1)
        mask = torch.cat([torch.zeros(1, front), torch.ones(1, 5), torch.zeros(1, 3 - front)], dim=1)
        assert close(net(padded, outputs_1O, mask_BS=mask)[0], right)
        assert not close(net(padded, outputs_1O)[0], right)


@torch.no_grad()
def test_inputs_of_nothing_but_padding_give_numbers() -> None:
    for dtype in (F64, torch.float32, torch.bfloat16, torch.float16):
        net = model().to(dtype)
        assert net(tokens(1, 5), tokens(1, 4), mask_BS=torch.zeros(1, 5))[0].isfinite().all()


@torch.no_grad()
def test_an_output_sees_all_inputs_and_the_outputs_before_it() -> None:
    # With few places too: a later token never takes an earlier one's.
    net = model(router=replace(SWITCH.router, sequence_capacity=1))
    inputs_BS, outputs_BO = tokens(1, 6), tokens(1, 6, seed=1)
    right, _ = net(inputs_BS, outputs_BO)
    outputs_BO[0, 3] = (outputs_BO[0, 3] + 1) % SWITCH.vocab
    changed, _ = net(inputs_BS, outputs_BO)
    assert changed[:, :3].equal(right[:, :3])
    assert not close(changed[:, 3:4], right[:, 3:4])
    inputs_BS[0, 5] = (inputs_BS[0, 5] + 1) % SWITCH.vocab
    assert not close(net(inputs_BS, outputs_BO)[0][:, :1], right[:, :1])


@torch.no_grad()
def test_a_sequence_is_as_it_is_alone_whatever_stands_beside_it() -> None:
    net = model(router=replace(SWITCH.router, sequence_capacity=2))
    inputs_BS, outputs_BO = tokens(3, 6), tokens(3, 6, seed=1)
    right, routings = net(inputs_BS, outputs_BO)
    assert sum(int(routing.dropped_TK.sum()) for routing in routings) > 0
    for b in range(3):
        assert close(net(inputs_BS[b : b + 1], outputs_BO[b : b + 1])[0], right[b : b + 1])


def test_generation_is_the_likeliest_token_each_time_and_ends() -> None:
    net = model(seed=3, stop=None)
    inputs_BS = tokens(3, 6)
    made_BO = net.train().generate(inputs_BS, 7)
    assert not net.training
    assert made_BO.shape == (3, 7)
    with torch.no_grad():
        before_BO = torch.cat([torch.full((3, 1), net.config.start), made_BO], dim=1)
        assert net(inputs_BS, before_BO)[0].argmax(-1)[:, :-1].equal(made_BO)
    # A token that one text comes to and another does not, or comes to later, ends them one after the other.
    stop = int(made_BO[0, 1])
    net.config = replace(net.config, stop=stop)
    for row, whole in zip(net.generate(inputs_BS, 7).tolist(), made_BO.tolist(), strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(row)
        assert row[:end] == whole[:end]
        assert set(row[end:]) <= {net.config.start}
    assert net.generate(inputs_BS[:1], 7).shape == (1, made_BO[0].tolist().index(stop) + 1)
    with pytest.raises(ConfigError, match="max_tokens = 0: at least 1"):
        net.generate(inputs_BS, 0)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mask_BS has shape \(2, 4\): it must be the inputs' \(2, 5\)"):
        model()(tokens(2, 5), tokens(2, 4), mask_BS=torch.ones(2, 4))


def test_it_learns_to_copy_with_balanced_experts() -> None:
    torch.manual_seed(0)
    router = RouterConfig(experts=4, top_k=1, normalize=False, sequence_capacity=4, jitter=0.01)
    sizes: dict[str, Any] = {"width": 32, "heads": 4, "head_dim": 8, "ffn": 32, "buckets": 32, "max_distance": 128}
    net = EncoderDecoder(replace(SWITCH, encoder_layers=2, decoder_layers=2, router=router, **sizes)).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=6e-3)
    losses = []
    for step in range(80):
        inputs_BS = tokens(32, 6, seed=step)
        outputs_BO = torch.cat([torch.zeros(32, 1).long(), inputs_BS[:, :-1]], dim=1)
        logits_BOV, routings = net(inputs_BS, outputs_BO)
        loss = F.cross_entropy(logits_BOV.flatten(0, 1), inputs_BS.flatten())
        balance = sum(switch_loss(routing) + 0.1 * z_loss(routing) for routing in routings)
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        if step == 0:
            grads = {name: p.grad for name, p in net.named_parameters()}
            assert all(grad is not None and 0 < grad.abs().sum() < math.inf for grad in grads.values())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) / 10 < 0.7 * math.log(11)  # guessing among the eleven tokens costs ln 11


# ---------------------------------------------------------------------------------------------------------------------
# The config.


def test_which_layers_are_moe() -> None:
    for every, layers in {0: [], 1: [0, 1, 2, 3, 4, 5], 2: [1, 3, 5], 3: [1, 4], 4: [1, 5], 6: [1], 9: [1]}.items():
        config = replace(SWITCH, encoder_layers=6, decoder_layers=6, encoder_moe_every=every)
        assert [i for i in range(6) if config.encoder_is_moe(i)] == layers
        config = replace(config, encoder_moe_every=1, decoder_moe_every=every)
        assert [i for i in range(6) if config.decoder_is_moe(i)] == layers


def test_config_as_plain_values_and_back() -> None:
    assert from_dict(EncoderDecoderConfig, to_dict(SWITCH)) == SWITCH
    assert replace(SWITCH, head_dim=None).head_dim == 4


def test_some_layer_must_be_moe() -> None:
    for layers, every, has in ((1, 1, True), (1, 2, False), (1, 9, False), (2, 9, True), (5, 3, True), (5, 0, False)):
        for stack, other in (("encoder", "decoder"), ("decoder", "encoder")):
            changes: dict[str, Any] = {
                f"{stack}_layers": layers, f"{stack}_moe_every": every, f"{other}_moe_every": 0,
            }  # fmt: skip
            if has:
                config = replace(SWITCH, **changes)
                assert any(map(config.encoder_is_moe, range(5))) or any(map(config.decoder_is_moe, range(5)))
            else:
                with pytest.raises(ConfigError, match="one that makes an MoE layer"):
                    replace(SWITCH, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": 0}, "encoder_layers = 0: at least 1"),
        ({"heads": 3, "head_dim": None}, "heads = 3: a divisor of width = 8, or give head_dim"),
        ({"activation": "tanh"}, "activation = 'tanh': one of swiglu"),
        ({"buckets": 7}, "buckets = 7: even, at least 4"),
        ({"max_distance": 4}, "max_distance = 4: above buckets / 2 = 4"),
        ({"start": 13}, "start = 13: a token of the vocabulary of 13"),
        ({"stop": -1}, "stop = -1: a token of the vocabulary of 13"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0: above 0"),
        ({"decoder_moe_every": -1}, "decoder_moe_every = -1: at least 0"),
        ({"encoder_moe_every": 0, "decoder_moe_every": 0}, "encoder_moe_every = 0: one that makes an MoE layer"),
        ({"router": RouterConfig(experts=4, top_k=1, choice="expert")}, "one with choice = 'token'"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^encoder_decoder.*{message}"):
        replace(SWITCH, **changes)
