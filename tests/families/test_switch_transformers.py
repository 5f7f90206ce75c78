"""Switch checkpoints become ours and back, byte for byte, with transformers' logits, experts, drops and generation."""

from __future__ import annotations

import importlib
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from handful.balance import switch_loss
from handful.checkpoint import read_json
from handful.cli import main
from handful.config import EncoderDecoderConfig, RouterConfig
from handful.encoder_decoder import EncoderDecoder
from handful.errors import CheckpointError, ConfigError, DataError
from handful.experts.quantize_model import quantize_model
from handful.families import load, save
from handful.families.io import find_config
from handful.families.switch_transformers import config_from_hf, config_to_hf
from handful.generate import answer_tokens, generate
from handful.sampling import Sampling
from handful.text import load_tokenizer, train_tokenizer

transformers: Any = importlib.import_module("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SIZES: dict[str, Any] = {
    "vocab_size": 37, "d_model": 10, "d_kv": 5, "d_ff": 9, "num_layers": 4, "num_sparse_encoder_layers": 2,
    "num_decoder_layers": 3, "num_sparse_decoder_layers": 1, "num_heads": 3, "num_experts": 4, "expert_capacity": 3,
    "decoder_start_token_id": 0,
}  # fmt: skip


def shape(seed: int) -> dict[str, Any]:
    """A config of odd sizes; every setting is drawn."""
    draw = random.Random(seed)
    encoder, decoder = draw.randint(1, 5), draw.randint(1, 5)
    return {
        "vocab_size": draw.randint(20, 60),
        "d_model": draw.randint(5, 24),
        "d_kv": draw.randint(3, 9),
        "d_ff": draw.randint(5, 30),
        "num_layers": encoder,
        "num_sparse_encoder_layers": draw.randint(0, encoder + 1),
        "num_decoder_layers": decoder,
        "num_sparse_decoder_layers": draw.randint(1, decoder),
        "num_heads": draw.randint(1, 4),
        "num_experts": draw.randint(1, 7),
        "expert_capacity": draw.randint(1, 5),
        "router_bias": draw.random() < 0.5,
        "relative_attention_num_buckets": draw.choice([4, 8, 12, 32]),
        "relative_attention_max_distance": draw.choice([17, 20, 128]),
        "dense_act_fn": draw.choice(["relu", "gelu"]),
        "layer_norm_epsilon": draw.choice([1e-6, 1e-3]),
        "tie_word_embeddings": draw.random() < 0.5,
        "decoder_start_token_id": 0,
    }


def theirs(**sizes: Any) -> Any:
    """A random Switch of transformers, in evaluation mode. Where embeddings are not tied its stacks begin with one
    embedding all the same, as T5's do; biases, which it begins at nothing, are random too."""
    model = transformers.SwitchTransformersForConditionalGeneration(transformers.SwitchTransformersConfig(**sizes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                p.copy_(model.shared.weight)
            elif name.endswith(("bias", "relative_attention_bias.weight")):
                p.normal_()
            elif p.dim() == 1:
                p.uniform_(0.5, 1.5)
    return model.eval()


def both(folder: Path, **sizes: Any) -> tuple[Any, EncoderDecoder]:
    """A model of transformers, and ours from the checkpoint that it wrote."""
    torch.manual_seed(sizes["vocab_size"])
    model = theirs(**sizes)
    model.save_pretrained(folder)
    return model, ours(folder)


def ours(folder: Path) -> EncoderDecoder:
    model = load(folder)
    assert isinstance(model, EncoderDecoder)
    return model


def batch(vocab: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, the mask that pads them in front or behind, and outputs: no token ends a text."""
    random_ = torch.Generator().manual_seed(seed)
    inputs_BS = torch.randint(2, vocab, (4, 23), generator=random_)
    outputs_BO = torch.randint(2, vocab, (4, 19), generator=random_)
    mask_BS = torch.ones(4, 23, dtype=torch.long)
    mask_BS[1, 9:], mask_BS[2, 22:], mask_BS[3, :5] = 0, 0, 0
    return inputs_BS.masked_fill(mask_BS == 0, 0), mask_BS, outputs_BO


def distance(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


def chosen_by(model: Any) -> list[Tensor]:
    """What its routers will choose, one (B, S, E) a layer: 1 at the expert of a token that has a place there."""
    seen: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__ == "SwitchTransformersTop1Router":
            module.register_forward_hook(lambda _module, _inputs, out: seen.append(out[0]))
    return seen


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_logits_experts_and_drops_are_theirs(seed: int, tmp_path: Path) -> None:
    model, mine = both(tmp_path / "theirs", **shape(seed))
    inputs_BS, mask_BS, outputs_BO = batch(mine.config.vocab, seed)
    chosen = chosen_by(model)
    right = model(input_ids=inputs_BS, attention_mask=mask_BS, decoder_input_ids=outputs_BO).logits
    logits_BOV, routings = mine(inputs_BS, outputs_BO, mask_BS=mask_BS)
    assert distance(logits_BOV, right) < 1e-5
    assert len(chosen) == len(routings) == len(mine.moe_layers)
    dropped = 0
    for theirs_BSE, routing in zip(chosen, routings, strict=True):
        assert routing.dropped_TK is not None
        kept_T1 = ~routing.dropped_TK
        mine_TE = torch.zeros(routing.scores_TE.shape, dtype=torch.long).scatter_(1, routing.experts_TK, kept_T1.long())
        assert mine_TE.equal(theirs_BSE.flatten(0, 1))
        dropped += int(routing.dropped_TK.sum())
    places = mine.config.router.experts * (mine.config.router.sequence_capacity or 0)
    assert dropped > 0 or places >= 19  # with fewer places than outputs some must go without

    save(mine, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    logits_BOV = again(input_ids=inputs_BS, attention_mask=mask_BS, decoder_input_ids=outputs_BO).logits
    assert distance(logits_BOV, right) < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_a_checkpoint_comes_back_byte_for_byte(seed: int, tmp_path: Path) -> None:
    _, mine = both(tmp_path / "theirs", **shape(seed))
    save(mine, tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(after[name].dtype == tensor.dtype and after[name].equal(tensor) for name, tensor in before.items())
    assert ours(tmp_path / "ours").config == mine.config
    assert find_config(tmp_path / "ours") == mine.config


@pytest.mark.parametrize("seed", range(6))
def test_generation_is_theirs(seed: int, tmp_path: Path) -> None:
    model, mine = both(tmp_path, **shape(seed))
    inputs_BS, mask_BS, _ = batch(mine.config.vocab, seed)
    made_BO = mine.generate(inputs_BS, 20, mask_BS=mask_BS)
    assert made_BO.shape == (4, 20) or (made_BO == 1).any(dim=1).all()
    for stop in (1, int(made_BO[0, 2])):  # the second ends the first text early
        # A cache of our own: the one that it makes has as many layers as the encoder, too few for a deeper decoder.
        cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        right = model.generate(
            input_ids=inputs_BS, attention_mask=mask_BS, max_new_tokens=20, do_sample=False, past_key_values=cache,
            eos_token_id=stop, pad_token_id=0, decoder_start_token_id=0,
        )  # fmt: skip
        mine.config = replace(mine.config, stop=stop)
        assert mine.generate(inputs_BS, 20, mask_BS=mask_BS).tolist() == right[:, 1:].tolist()


def test_gradients_are_theirs(tmp_path: Path) -> None:
    model, mine = both(tmp_path, **SIZES)
    inputs_BS, mask_BS, outputs_BO = batch(37, 1)
    target_N = outputs_BO.roll(-1, 1).flatten()
    right = model(input_ids=inputs_BS, attention_mask=mask_BS, decoder_input_ids=outputs_BO).logits
    torch.nn.functional.cross_entropy(right.flatten(0, 1), target_N).backward()
    logits_BOV, routings = mine(inputs_BS, outputs_BO, mask_BS=mask_BS)
    torch.nn.functional.cross_entropy(logits_BOV.flatten(0, 1), target_N).backward()
    pairs = {
        "shared.weight": mine.embed.weight,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": mine.encoder.position.weight,
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": mine.decoder.position.weight,
        "encoder.block.1.layer.1.mlp.router.classifier.weight": mine.moe_layers[0].router.weight,
        "decoder.block.2.layer.1.EncDecAttention.k.weight": mine.decoder.get_parameter("layers.2.cross.k.weight"),
    }
    grads = {name: p.grad for name, p in model.named_parameters()}
    for name, p in pairs.items():
        assert p.grad is not None
        assert distance(p.grad, grads[name]) < 1e-5, name
    wi = torch.stack([grads[f"decoder.block.1.layer.2.mlp.experts.expert_{e}.wi.weight"] for e in range(4)])
    assert mine.moe_layers[-1].experts.gate_up.grad is not None
    assert distance(mine.moe_layers[-1].experts.gate_up.grad, wi) < 1e-5
    assert sum(switch_loss(routing) for routing in routings) > 0


@torch.no_grad()
def test_in_bfloat16_the_routers_stay_float32(tmp_path: Path) -> None:
    _, mine = both(tmp_path, **SIZES)
    inputs_BS, mask_BS, outputs_BO = batch(37, 1)
    right, _ = mine(inputs_BS, outputs_BO, mask_BS=mask_BS)
    half = load(tmp_path, dtype=torch.bfloat16)
    logits_BOV, routings = half(inputs_BS, outputs_BO, mask_BS=mask_BS)
    assert logits_BOV.dtype == torch.bfloat16
    assert all(routing.logits_TE.dtype == torch.float32 for routing in routings)
    assert distance(logits_BOV.float(), right) < 0.2  # a token that goes to another expert is far off
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(mine(inputs_BS, outputs_BO, mask_BS=mask_BS)[0].float(), right) < 0.2
        assert mine.generate(inputs_BS, 2, mask_BS=mask_BS).shape == (4, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The published forms, and what is refused.

# As google/switch-base-8 has it.
BASE_8: dict[str, Any] = {
    "add_router_probs": False, "architectures": ["SwitchTransformersForConditionalGeneration"], "d_ff": 3072,
    "d_kv": 64, "d_model": 768, "decoder_sparse_step": 2, "decoder_start_token_id": 0, "dense_act_fn": "relu",
    "dropout_rate": 0.1, "encoder_sparse_step": 2, "eos_token_id": 1, "expert_capacity": 64,
    "feed_forward_proj": "relu", "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": False,
    "layer_norm_epsilon": 1e-06, "model_type": "switch_transformers", "n_positions": 512, "num_decoder_layers": 12,
    "num_experts": 8, "num_heads": 12, "num_layers": 12, "num_selected_experts": 1, "num_sparse_decoder_layers": 6,
    "num_sparse_encoder_layers": 6, "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "router_aux_loss_coef": 0.001, "router_bias": False,
    "router_dtype": "float32", "router_ignore_padding_tokens": False, "router_jitter_noise": 0.01,
    "router_type": "tokens_masked", "router_z_loss_coef": 0.001, "torch_dtype": "float32",
    "transformers_version": "4.25.0.dev0", "use_cache": True, "vocab_size": 32128,
}  # fmt: skip


def test_the_published_config_is_read() -> None:
    config = config_from_hf(BASE_8)
    assert config == EncoderDecoderConfig(
        vocab=32128, width=768, encoder_layers=12, decoder_layers=12, heads=12, head_dim=64, ffn=3072,
        router=RouterConfig(experts=8, top_k=1, normalize=False, sequence_capacity=64, jitter=0.01),
        encoder_moe_every=2, decoder_moe_every=2, activation="relu", buckets=32, max_distance=128, norm_eps=1e-6,
        tied=True, start=0, stop=1,
    )  # fmt: skip
    assert [i for i in range(12) if config.encoder_is_moe(i)] == [1, 3, 5, 7, 9, 11]
    written = config_to_hf(config)
    assert {key: BASE_8.get(key, True) for key in written} == written  # tie_word_embeddings goes without saying


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense_act_fn": "gated-gelu"}, "dense_act_fn = 'gated-gelu': only 'relu' and 'gelu' are supported"),
        ({"router_dtype": "bfloat16"}, "router_dtype = 'bfloat16': only 'float32' is supported"),
        ({"router_ignore_padding_tokens": True}, "router_ignore_padding_tokens = True: only False is supported"),
        ({"num_selected_experts": 2}, "num_selected_experts = 2: only 1 is supported"),
        ({"mystery": 3}, "mystery = 3: not known for switch_transformers; remove it if it changes no logits"),
        ({"num_experts": None}, "num_experts is missing"),
        ({"num_sparse_encoder_layers": "many", "encoder_sparse_step": None}, "'many': malformed"),
        ({"num_heads": 0}, "encoder_decoder.heads = 0: at least 1"),
        ({"encoder_sparse_step": 0, "decoder_sparse_step": 0}, "encoder_decoder.encoder_moe_every = 0: one that makes"),
        ({"expert_capacity": 0}, "router.sequence_capacity = 0: at least 1"),
    ],
)
def test_a_config_is_refused_by_its_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        config_from_hf(BASE_8 | change)
    assert message in str(error.value)


def test_ours_must_be_an_object() -> None:
    with pytest.raises(CheckpointError, match="encoder_decoder = 3: must be an object"):
        config_from_hf({"model_type": "handful", "encoder_decoder": 3})


@pytest.mark.parametrize("step", [0, 1, 3, 4, 5, 9])
def test_a_step_that_no_number_of_layers_gives_is_kept(step: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = theirs(**SIZES | {"num_layers": 9, "encoder_sparse_step": step})
    model.save_pretrained(tmp_path / "theirs")
    mine = ours(tmp_path / "theirs")
    sparse = [block.layer[-1].is_sparse for block in model.encoder.block]
    assert [mine.config.encoder_is_moe(i) for i in range(9)] == sparse
    save(mine, tmp_path / "ours")
    again = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert [block.layer[-1].is_sparse for block in again.encoder.block] == sparse


def test_the_number_of_layers_says_the_step_where_it_is_absent() -> None:
    for count in (0, 1, 2, 3, 4, 5, 12, 13):
        said = {key: value for key, value in BASE_8.items() if not key.endswith("_sparse_step")}
        said["num_sparse_encoder_layers"] = count
        right = transformers.SwitchTransformersConfig(**said).encoder_sparse_step
        assert config_from_hf(said).encoder_moe_every == right


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
def test_copies_of_the_embedding_may_stand_there_but_must_be_copies(name: str, tmp_path: Path) -> None:
    _, mine = both(tmp_path, **SIZES)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors["shared.weight"].clone()}, file, metadata={"format": "pt"})
    assert ours(tmp_path).embed.weight.equal(mine.embed.weight)
    save_file(tensors | {name: tensors["shared.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor '{name}' differs from 'shared.weight': must be a copy of it"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("decoder.block.1.layer.2.mlp.experts.expert_3.wo.weight", None, "is missing"),
        ("decoder.block.9.layer.2.mlp.wi.weight", torch.zeros(9, 10), "unexpected tensor"),
        ("encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight", torch.zeros(9, 11), r"shape \[9, 11\]: must be"),
        ("encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight", torch.zeros(9, 10).half(), "must be torch.float32"),
        ("shared.weight", torch.zeros(37, 10, dtype=torch.int8), "quantized weights cannot be loaded"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, tensor: Tensor | None, message: str, tmp_path: Path) -> None:
    both(tmp_path, **SIZES)
    file = tmp_path / "model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if key != name}
    save_file(tensors if tensor is None else tensors | {name: tensor}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path)
    assert f"tensor {name!r}" in str(error.value)
    assert "model.safetensors: " in str(error.value)


@pytest.mark.parametrize(
    ("router", "changes"),
    [
        ({"top_k": 2}, {}),
        ({"sequence_capacity": None}, {}),
        ({}, {"activation": "geglu"}),
    ],
)
@torch.no_grad()
def test_what_the_public_form_cannot_say_is_written_as_ours(
    router: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    routing = RouterConfig(**({"experts": 4, "top_k": 1, "normalize": False, "sequence_capacity": 3} | router))
    sizes: dict[str, Any] = {"vocab": 37, "width": 12, "encoder_layers": 2, "decoder_layers": 3, "heads": 3, "ffn": 8}
    mine = EncoderDecoder(EncoderDecoderConfig(router=routing, **sizes, **changes)).eval()
    save(mine, tmp_path)
    assert read_json(tmp_path / "config.json")["model_type"] == "handful"
    again = ours(tmp_path)
    assert again.config == mine.config
    inputs_BS, mask_BS, outputs_BO = batch(37, 0)
    right, _ = mine(inputs_BS, outputs_BO, mask_BS=mask_BS)
    assert again(inputs_BS, outputs_BO, mask_BS=mask_BS)[0].equal(right)


def test_what_is_written_holds_no_setting_twice(tmp_path: Path) -> None:
    _, mine = both(tmp_path / "theirs", **SIZES)
    save(mine, tmp_path / "ours")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert {key: after[key] for key in after if key in before} == {key: before[key] for key in after if key in before}


# ---------------------------------------------------------------------------------------------------------------------
# Text.


def test_a_prompt_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(["the router of an expert chooses tokens"] * 3, 280)
    routing = RouterConfig(experts=4, top_k=1, normalize=False, sequence_capacity=3)
    torch.manual_seed(2)
    mine = EncoderDecoder(
        EncoderDecoderConfig(
            vocab=tokenizer.vocab_size, width=12, encoder_layers=2, decoder_layers=2, heads=3, ffn=8, router=routing,
            start=5, stop=tokenizer.eos_id,
        )
    )  # fmt: skip
    mine.tokenizer = tokenizer
    save(mine, tmp_path)
    model = ours(tmp_path)
    inputs = [*tokenizer.encode("the router"), tokenizer.eos_id]
    made = mine.generate(torch.tensor([inputs]), 6)[0].tolist()
    assert len(set(made)) > 1
    greedy = Sampling(temperature=0)
    assert list(answer_tokens(model, inputs, 6, greedy)) == made
    text = tokenizer.decode(made)
    assert "".join(generate(model, "the router", max_tokens=6, sampling=greedy)) == text
    # Special tokens that the prompt spells are what they are, and the end is not written twice.
    assert "".join(generate(model, "the router<|endoftext|>", max_tokens=6, sampling=greedy)) == text
    model.config = replace(model.config, stop=made[2])
    assert list(answer_tokens(model, inputs, 6, greedy)) == made[: made.index(made[2])]
    drawn = [list(answer_tokens(model, inputs, 6, Sampling(temperature=3, seed=seed))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]

    arguments = ["handful", "generate", str(tmp_path), "the router", "--max-tokens", "6", "--temperature", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out == text + "\n"  # an answer: the prompt is no part of it

    for prompt, most, message in (
        ([], 6, "prompt: at least one token"),
        ([999], 6, "prompt: a token is outside the vocabulary"),
        ([1], 0, "max_tokens = 0: at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            next(answer_tokens(model, prompt, most))


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_a_checkpoint_is_packed_as_it_is_read(bits: int, tmp_path: Path) -> None:
    _, mine = both(tmp_path, **SIZES | {"d_model": 64, "d_kv": 32, "d_ff": 96, "num_heads": 2})
    inputs_BS, mask_BS, outputs_BO = batch(37, 1)
    packed = load(tmp_path, quantize=bits)
    quantize_model(mine, bits)
    right, _ = mine(inputs_BS, outputs_BO, mask_BS=mask_BS)
    assert packed(inputs_BS, outputs_BO, mask_BS=mask_BS)[0].equal(right)


def test_t5s_tokenizer_is_taken_by_an_encoder_decoder_alone(tmp_path: Path) -> None:
    # As T5's is made: pieces without byte fallback, "</s>" after every text.
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram())
    parts = [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()]
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    inner.decoder = tokenizers.decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(["the router of an expert chooses tokens and words too"] * 5, trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    both(tmp_path, **SIZES | {"vocab_size": inner.get_vocab_size()})
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="a byte-level or byte-fallback one is needed"):
        load_tokenizer(tmp_path)

    mine = ours(tmp_path)
    assert mine.tokenizer is not None
    prompt = "the <extra_id_0> of \u2603 words"
    inputs = inner.encode(prompt).ids
    assert {2, 3} < set(inputs)  # the snowman is unknown, the gap is a token
    assert mine.tokenizer.encode(prompt, special=True) == inputs
    assert mine.tokenizer.decode(inputs, special=True) == inner.decode(inputs, skip_special_tokens=False)
    made = mine.generate(torch.tensor([inputs]), 8)[0].tolist()
    answer = "".join(generate(mine, prompt, max_tokens=8, sampling=Sampling(temperature=0)))
    assert answer == inner.decode(made[: made.index(1)] if 1 in made else made, skip_special_tokens=False)
