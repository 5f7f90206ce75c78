"""Generation: the cache gives what the whole forward pass gives, draws follow the probabilities, and it stops.

Legend: S tokens · V vocabulary
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCAB, dense, moe, tiny_data
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from handful.config import ModelConfig
from handful.data import Data
from handful.errors import CheckpointError, ConfigError
from handful.generate import generate, generate_tokens
from handful.model import Decoder
from handful.sampling import Sampler, Sampling, sample
from handful.text import Tokenizer

GREEDY = Sampling(temperature=0)
PROMPT = [5, 9, 2, 60, 61]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return tiny_data(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def model() -> Decoder:
    return Decoder(moe())


@pytest.mark.parametrize(
    "config",
    [
        dense(kv_heads=1),
        moe({"balance_bias": True, "score": "sigmoid"}, shared_width=8),
        moe({"jitter": 0.3, "noisy_top_k": True}, qk_norm="full", qkv_bias=True),  # noise is for training alone
    ],
)
def test_greedy_is_the_argmax_of_the_whole_forward_pass(config: ModelConfig) -> None:
    model = Decoder(config).double()
    made = list(generate_tokens(model, PROMPT, 20, GREEDY))
    assert len(made) == 20
    tokens = list(PROMPT)
    with torch.no_grad():
        for token in made:
            logits_1SV, _ = model(torch.tensor([tokens]))
            assert token == int(logits_1SV[0, -1].argmax())
            tokens.append(token)


def test_a_seed_fixes_the_draws(model: Decoder) -> None:
    def draws(seed: int | None) -> list[int]:
        return list(generate_tokens(model, PROMPT, 12, Sampling(temperature=1.5, top_p=1.0, seed=seed)))

    torch.manual_seed(1)
    first = draws(7)
    torch.manual_seed(2)  # other people's random numbers do not matter
    assert draws(7) == first
    assert draws(8) != first
    assert draws(None) != draws(None)


# ---------------------------------------------------------------------------------------------------------------------
# One draw.


def shares(logits: list[float], sampling: Sampling, draws: int = 2000) -> dict[int, float]:
    random = torch.Generator().manual_seed(0)
    counts = Counter(sample(torch.tensor(logits), sampling, random) for _ in range(draws))
    return {token: count / draws for token, count in sorted(counts.items())}


def close(found: dict[int, float], right: dict[int, float], draws: int = 2000) -> bool:
    """Within four standard deviations of a share, for every token."""
    return found.keys() == right.keys() and all(
        abs(found[token] - p) <= 4 * math.sqrt(p * (1 - p) / draws) for token, p in right.items()
    )


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) + 3.0 for p in probabilities]  # a constant changes nothing


def test_draws_follow_the_probabilities() -> None:
    found = shares(logs(0.5, 0.1, 0.4), Sampling(temperature=1, top_p=1))
    assert close(found, {0: 0.5, 1: 0.1, 2: 0.4})
    assert not close(found, {0: 0.4, 1: 0.2, 2: 0.4})  # the bound means something


def test_temperature_sharpens() -> None:
    """At 1/2, probabilities are squared: 16/26, 1/26 and 9/26 of 4/8, 1/8 and 3/8."""
    assert close(shares(logs(4, 1, 3), Sampling(temperature=0.5, top_p=1)), {0: 16 / 26, 1: 1 / 26, 2: 9 / 26})
    assert shares(logs(4, 1, 3), Sampling(temperature=1e-3, top_p=1), draws=50) == {0: 1.0}
    assert close(shares(logs(4, 1, 3), Sampling(temperature=math.inf, top_p=1)), {0: 1 / 3, 1: 1 / 3, 2: 1 / 3})


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.49, [3]), (0.51, [3, 0]), (0.79, [3, 0]), (0.81, [3, 0, 2]), (0.96, [3, 0, 2, 1]), (1e-9, [3])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    probabilities = [0.3, 0.05, 0.15, 0.5]
    total = sum(probabilities[token] for token in kept)
    right = {token: probabilities[token] / total for token in sorted(kept)}
    assert close(shares(logs(*probabilities), Sampling(temperature=1, top_p=top_p)), right)


def test_top_p_reached_exactly_needs_no_more() -> None:
    """Two tokens of one half each: either of them alone is enough."""
    assert len(shares([0.0, 0.0, -math.inf], Sampling(temperature=1, top_p=0.5), draws=50)) == 1
    assert len(shares([0.0, 0.0, -math.inf], Sampling(temperature=1, top_p=0.51), draws=50)) == 2


@given(
    logits=st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 1e-30, 1e-3, 0.7, 1.0, 50.0]),
    top_p=st.floats(1e-6, 1.0),
    seed=st.integers(0, 1000),
)
def test_a_draw_is_always_a_likely_token(logits: list[float], temperature: float, top_p: float, seed: int) -> None:
    logits_V = torch.tensor(logits)
    token = sample(logits_V, Sampling(temperature=temperature, top_p=top_p), torch.Generator().manual_seed(seed))
    if temperature == 0:
        assert token == int(logits_V.argmax())
        return
    shares_V = ((logits_V.double() - logits_V.max()) / temperature).softmax(-1)
    # All that are likelier than it do not reach top_p by themselves.
    assert float(shares_V[shares_V > shares_V[token]].sum()) < top_p + 1e-5
    assert shares_V[token] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings",
    [{"temperature": t} for t in (1e-6, 1e-30, 1e-38, 1e-40, 5e-324)]
    + [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-45}, {"top_p": 5e-324}, {"min_p": 1.0, "top_p": 1.0}],
)
def test_settings_that_leave_one_token(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Near 0, temperature is greedy: no quotient leaves float32's range."""
    logits_V = torch.linspace(-9, 30, 500)[torch.randperm(500)].to(dtype)
    for scale in (1.0, 1000.0):
        best = int((logits_V * scale).argmax())
        made = {sample(logits_V * scale, Sampling(seed=seed, **settings)) for seed in range(3)}
        assert made == {best}


@given(
    logits=st.lists(st.floats(width=32, allow_nan=False).filter(lambda x: x < math.inf), min_size=1, max_size=9),
    temperature=st.sampled_from([0.0, 5e-324, 1e-40, 1e-3, 1.0, 1e30, math.inf]),
    top_p=st.sampled_from([5e-324, 1e-9, 0.5, 1.0]),
    min_p=st.sampled_from([0.0, 1.0]),
    penalty=st.sampled_from([0.01, 1.0, 100.0]),
)
def test_any_logits_give_a_token_or_one_line(
    logits: list[float], temperature: float, top_p: float, min_p: float, penalty: float
) -> None:
    settings = Sampling(temperature=temperature, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=0)
    sampler = Sampler(settings, range(len(logits)), torch.device("cpu"))
    if max(logits) == -math.inf or (penalty != 1 and max(map(abs, logits)) > 1e36):  # more than float32 has room for
        with contextlib.suppress(CheckpointError):
            sampler(torch.tensor(logits))
        return
    assert logits[sampler(torch.tensor(logits))] > -math.inf


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_told_of(temperature: float, broken: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature), [], torch.device("cpu"))
    logits_V = torch.randn(2000)
    logits_V[9] = broken
    said = f"the largest of the model's logits is {broken}: its weights are damaged, or too large for torch.float32"
    with pytest.raises(CheckpointError, match=f"^{re.escape(said)}$"):
        sampler(logits_V)
    with pytest.raises(CheckpointError, match="logits is -inf"):
        sampler(torch.full((5,), -math.inf))


def test_one_token_above_nothing() -> None:
    logits_V = torch.full((5000,), -math.inf)
    logits_V[7] = 0.0
    cases: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.3}, {"temperature": 0.0}, {"temperature": math.inf}]
    for settings in cases:
        assert Sampler(Sampling(seed=0, **settings), range(50), torch.device("cpu"))(logits_V) == 7


def test_a_draw_leaves_the_logits_as_they_are() -> None:
    logits_V = torch.tensor(logs(0.3, 0.2, 0.5))
    before = logits_V.clone()
    sample(logits_V, Sampling(top_p=0.5))
    assert torch.equal(logits_V, before)


def test_bfloat16_logits() -> None:
    assert sample(torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16), GREEDY) == 1
    assert sample(torch.tensor([1.0, 90.0, 2.0], dtype=torch.bfloat16), Sampling()) == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: at least 0"),
        ({"temperature": math.nan}, "temperature = nan: at least 0"),
        ({"top_p": 0.0}, "top_p = 0.0: above 0, at most 1"),
        ({"top_p": 1.1}, "top_p = 1.1: above 0, at most 1"),
        ({"top_p": math.nan}, "top_p = nan: above 0, at most 1"),
    ],
)
def test_sampling_errors(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(**values)
    assert str(caught.value) == said


# ---------------------------------------------------------------------------------------------------------------------
# Where it stops.


def test_at_the_end_of_text(model: Decoder) -> None:
    whole = list(generate_tokens(model, PROMPT, 20, GREEDY))
    stop = whole[7]
    assert list(generate_tokens(model, PROMPT, 20, GREEDY, stop=stop)) == whole[: whole.index(stop)]
    assert list(generate_tokens(model, PROMPT, 20, GREEDY, stop=whole[0])) == []


def test_at_the_models_context(model: Decoder) -> None:
    assert len(list(generate_tokens(model, PROMPT, 1000, GREEDY))) == 32 - len(PROMPT)
    assert len(list(generate_tokens(model, [1] * 31, 1000, GREEDY))) == 1


def test_at_max_tokens(model: Decoder) -> None:
    for count in (1, 2, 5):
        assert len(list(generate_tokens(model, PROMPT, count, GREEDY))) == count


def test_no_forward_pass_is_wasted(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    real = model.hidden_states

    def hidden_states(tokens_BS: Tensor, cache: Any = None, **told: Any) -> Any:
        lengths.append(tokens_BS.shape[1])
        return real(tokens_BS, cache)

    monkeypatch.setattr(model, "hidden_states", hidden_states)
    assert len(list(generate_tokens(model, PROMPT, 4, GREEDY))) == 4
    assert lengths == [5, 1, 1, 1]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "said"),
    [
        ([], 5, "prompt: at least one token"),
        ([1] * 32, 5, "prompt: 32 tokens; the model's context is 32, so at most 31"),
        ([1, VOCAB], 5, "prompt: a token is outside the vocabulary of 300"),
        ([-1, 1], 5, "prompt: a token is outside the vocabulary of 300"),
        ([1], 0, "max_tokens = 0: at least 1"),
    ],
)
def test_prompt_errors(prompt: list[int], max_tokens: int, said: str, model: Decoder) -> None:
    with pytest.raises(ConfigError) as caught:
        next(generate_tokens(model, prompt, max_tokens))
    assert str(caught.value) == said


def test_closing_early_leaves_nothing_behind(model: Decoder) -> None:
    model.train()
    stream = generate_tokens(model, PROMPT, 20, GREEDY)
    first = next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()  # type: ignore[attr-defined]
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert not model.training  # as `generate_tokens` leaves it
    # The weights are ordinary ones still: they can be trained, and generate the same again.
    model(torch.tensor([PROMPT]))[0].sum().backward()
    assert model.embed.weight.grad is not None
    assert next(generate_tokens(model, PROMPT, 20, GREEDY)) == first


def test_two_at_once_do_not_meet(model: Decoder) -> None:
    alone = [list(generate_tokens(model, prompt, 10, GREEDY)) for prompt in ([1, 2, 3], PROMPT)]
    one, two = generate_tokens(model, [1, 2, 3], 10, GREEDY), generate_tokens(model, PROMPT, 10, GREEDY)
    pairs = list(zip(one, two, strict=True))
    assert [[a for a, _ in pairs], [b for _, b in pairs]] == alone


# ---------------------------------------------------------------------------------------------------------------------
# Text.


def says(model: Decoder, tokenizer: Tokenizer, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Make the model say these tokens, whatever it is asked. What it was asked is returned, as it grows."""
    model.tokenizer = tokenizer
    asked: list[list[int]] = []
    left = iter(tokens)

    def hidden_states(tokens_BS: Tensor, cache: Any, **told: Any) -> Any:
        asked.append(tokens_BS[0].tolist())
        return torch.zeros(1, tokens_BS.shape[1], model.config.width), []

    def logits(x: Tensor) -> Tensor:
        return (100.0 * torch.eye(VOCAB)[next(left)]).expand(*x.shape[:-1], VOCAB)

    monkeypatch.setattr(model, "hidden_states", hidden_states)
    monkeypatch.setattr(model, "logits", logits)
    return asked


def test_a_split_character_comes_whole(model: Decoder, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "é☃😀" byte by byte: nine tokens, of which each character's last one shows it."""
    tokenizer = data.tokenizer
    byte_of = {tokenizer.token_bytes(token): token for token in reversed(range(tokenizer.vocab_size))}
    tokens = [byte_of[bytes([byte])] for byte in "é☃😀".encode()]
    asked = says(model, tokenizer, [*tokens, tokenizer.eos_id], monkeypatch)
    pieces = list(generate(model, "naïve", sampling=GREEDY))
    assert pieces == ["", "é", "", "", "☃", "", "", "", "😀", ""]
    assert asked[0] == [tokenizer.eos_id, *tokenizer.encode("naïve")]


def test_a_character_that_is_cut_off_is_replaced(model: Decoder, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = data.tokenizer
    byte_of = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    tokens = [byte_of[bytes([byte])] for byte in "☃".encode()[:2]]
    says(model, tokenizer, [*tokens, tokenizer.eos_id], monkeypatch)
    assert list(generate(model, "x", sampling=GREEDY)) == ["", "", "�"]


def test_text_is_the_decoded_tokens(model: Decoder, data: Data) -> None:
    model.tokenizer = data.tokenizer
    for prompt in ("the router", "", "☃"):
        sampling = Sampling(temperature=1.0, top_p=1.0, seed=3)
        text = "".join(generate(model, prompt, max_tokens=15, sampling=sampling))
        tokens = [data.tokenizer.eos_id, *data.tokenizer.encode(prompt)]
        made = list(generate_tokens(model, tokens, 15, sampling, stop=data.tokenizer.eos_id))
        assert text == data.tokenizer.decode(made)


def test_text_errors(model: Decoder, data: Data, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model: it has no tokenizer; use generate_tokens, or load"):
        next(generate(model, "x"))
    model.tokenizer = data.tokenizer
    with pytest.raises(ConfigError, match=r"^prompt: \d+ tokens; the model's context is 32, so at most 31$"):
        next(generate(model, "☃" * 100))
    with pytest.raises(ConfigError, match=r"^prompt = 'a.udcffb': must be UTF-8$"):
        next(generate(model, "a\udcffb"))  # as a shell hands over a byte that is not UTF-8
