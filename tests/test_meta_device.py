"""A model of which only the shapes are wanted has those that it would have."""

from __future__ import annotations

import pytest
import torch
from builders import dense, moe
from torch import nn

from handful.config import EncoderDecoderConfig, MLAConfig, RouterConfig
from handful.encoder_decoder import EncoderDecoder
from handful.meta_device import meta_device
from handful.model import Decoder

SWITCH = EncoderDecoderConfig(
    vocab=13, width=8, encoder_layers=2, decoder_layers=2, heads=2, head_dim=5, ffn=6,
    router=RouterConfig(experts=4, top_k=1, normalize=False),
)  # fmt: skip
LATENT = MLAConfig(q_rank=None, kv_rank=6, nope_dim=4, rope_dim=4, v_dim=5)


def described(model: nn.Module) -> dict[str, object]:
    return {name: (t.shape, t.dtype, t.device.type, type(t)) for name, t in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize(
    "shape",
    [
        moe(),
        moe(
            {"noisy_top_k": True, "balance_bias": True, "logits_bias": True},
            expert_bias=True,
            shared_width=8,
            sinks=True,
        ),
        dense(tied=False, qkv_bias=True),
        dense(mla=LATENT, rope_adjacent=True),
        SWITCH,
    ],
    ids=["moe", "all", "dense", "latent", "switch"],
)
def test_shapes_are_those_of_torchs_meta_device(shape: object) -> None:
    def make() -> nn.Module:
        return EncoderDecoder(shape) if isinstance(shape, EncoderDecoderConfig) else Decoder(shape)  # type: ignore[arg-type]

    with torch.device("meta"):
        right = described(make())
    with meta_device():
        found = described(make())
    assert found == right
    assert len(found) > 8
    assert all(tensor.device.type == "cpu" for tensor in make().state_dict().values())  # and nowhere else
