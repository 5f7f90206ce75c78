"""The lesson of a comparison: numbers of hand-made routings, and of small models against their own definitions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import dense, moe, tiny_data
from torch import Tensor

from handful import lesson as module
from handful.config import ModelConfig
from handful.data import Data
from handful.lesson import cards, continuations, experts_off, lesson, token_losses, way, word
from handful.model import Decoder
from handful.observe import used
from handful.routing import Limits, Routing


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return tiny_data(tmp_path_factory.mktemp("lesson"))


def made(config: ModelConfig, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(config).eval()


def routing_of(experts_TK: list[list[int]], experts: int, dropped_TK: list[list[bool]] | None = None) -> Routing:
    chosen = torch.tensor(experts_TK)
    even = torch.full((len(chosen), experts), 1 / experts)
    out = None if dropped_TK is None else torch.tensor(dropped_TK)
    return Routing(even, even, chosen, torch.ones(chosen.shape), out)


def test_used_leaves_out_what_was_dropped() -> None:
    routing = routing_of([[0, 1], [2, 0]], 3, [[False, True], [False, False]])
    assert used(routing).tolist() == [[True, False, False], [True, False, True]]


def test_cards_by_hand() -> None:
    """Token 7 stands three times, and always goes to experts 0 and 1; token 8 once, to 0 and 2."""
    found = cards(routing_of([[0, 1], [1, 0], [0, 1], [0, 2]], 4), [7, 7, 7, 8])
    assert [card["load"] for card in found] == [0.5, 0.375, 0.125, 0.0]
    assert found[0]["tokens"] == [[7, 3, 3], [8, 1, 1]]
    assert found[0]["partners"] == [[1, 0.75, 0.75], [2, 0.25, 0.25]]
    assert found[1]["partners"] == [[0, 1.0, 1.0]]
    assert found[2]["tokens"] == [[8, 1, 1]]
    assert (found[3]["tokens"], found[3]["partners"]) == ([], [])
    # Of two tokens that came as often, the one that came nowhere else.
    assert cards(routing_of([[0], [0], [1]], 2), [5, 9, 5])[0]["tokens"] == [[9, 1, 1], [5, 1, 2]]


def test_a_word_in_two_contexts_by_hand(data: Data) -> None:
    """A word stands at 1, 4 and 7: the first two share no expert, the third has one of each."""
    tokenizer = data.tokenizer
    word_id = tokenizer.encode(" router")[0]
    assert tokenizer.token_bytes(word_id) == b" router"
    filler = tokenizer.encode("=")[0]
    tokens_BS = torch.tensor([[filler if i not in (1, 4, 7) else word_id for i in range(9)]])
    other = [6, 7]
    chosen = [other, [0, 1], other, other, [2, 3], other, other, [1, 2], other]
    result = word(tokens_BS, [routing_of(chosen, 8)], tokenizer)
    assert result is not None
    found, places = result
    assert places == (1, 4)
    assert found == {
        "word": " router", "asked": "Paris", "count": 3, "shared": 0, "of": 2, "mean": pytest.approx(2 / 3, abs=1e-3),
        # Six fillers share 2 with each other, 30 pairs there and back; the words share 1 in two pairs, 4 so.
        "any": pytest.approx((30 * 2 + 4 * 1) / 72, abs=1e-3),
    }  # fmt: skip


def test_the_most_frequent_word_that_differs_is_taken(data: Data) -> None:
    """Not one that always goes the same way, though more frequent, nor one that differs more and is rarer."""
    tokenizer = data.tokenizer
    same, half, rare = (tokenizer.encode(text)[0] for text in (" router", " chooses", " weights"))
    assert [tokenizer.token_bytes(t) for t in (same, half, rare)] == [b" router", b" chooses", b" weights"]
    flat = [tokenizer.encode("=")[0], *[same] * 4, *[half] * 3, *[rare] * 2]
    chosen = [[0, 1], *[[0, 1]] * 4, [2, 3], [3, 4], [2, 3], [4, 5], [6, 7]]
    result = word(torch.tensor([flat]), [routing_of(chosen, 8)], tokenizer)
    assert result is not None
    assert (result[0]["word"], result[0]["shared"], result[0]["count"]) == (" chooses", 1, 3)
    # Where none differs by half, the nearest to it.
    alike = word(torch.tensor([flat[:5]]), [routing_of(chosen[:5], 8)], tokenizer)
    assert alike is not None
    assert (alike[0]["word"], alike[0]["shared"], alike[0]["of"]) == (" router", 2, 2)


def test_the_word_that_is_asked_for_comes_first(data: Data) -> None:
    """It may be of several tokens, whose last one is looked at, and alike in both places."""
    tokenizer = data.tokenizer
    asked = tokenizer.encode(" Paris")
    assert len(asked) > 1
    filler = tokenizer.encode("=")[0]
    flat = [filler, *asked, filler, *asked, filler]
    routing = routing_of([[0, 1]] * len(flat), 4)
    result = word(torch.tensor([flat]), [routing, routing], tokenizer)
    assert result is not None
    found, places = result
    assert (found["word"], found["count"], found["shared"], found["of"]) == (" Paris", 2, 4, 4)
    assert places == (len(asked), 2 * len(asked) + 1)
    assert word(torch.tensor([[filler] * 4]), [routing_of([[0, 1]] * 4, 4)], tokenizer) is None


@pytest.mark.parametrize("shared", [0, 20])
def test_the_way_adds_up(shared: int) -> None:
    """The parts of a blend are the whole blend, the stream grows by it, and the scores are the model's own."""
    model = made(moe({"experts": 6, "top_k": 2}, shared_width=shared))
    tokens = list(range(1, 13))
    ways = way(model, tokens, [4, 11])
    logits_BSV, routings = model(torch.tensor([tokens]))
    assert [one["at"] for one in ways] == [4, 11]
    for one in ways:
        for found, routing in zip(one["layers"], routings, strict=True):
            assert found["experts"] == routing.experts_TK[one["at"]].tolist()
            assert found["scores"] == pytest.approx(routing.scores_TE[one["at"]].tolist(), rel=1e-3)
            assert found["weights"] == pytest.approx(routing.weights_TK[one["at"]].tolist(), rel=1e-3)
            assert sum(found["shares"]) == pytest.approx(1, abs=2e-3)
            assert len(found["shares"]) == 2 + bool(shared)
            blend = [sum(w * x for w, x in zip(found["weights"], column, strict=True))
                     for column in zip(*found["outputs"], strict=True)]  # fmt: skip
            if not shared:
                assert blend == pytest.approx(found["blend"], rel=5e-3, abs=1e-3)
        best = logits_BSV[0, one["at"]].softmax(-1).topk(5)
        assert [token for token, _ in one["next"]] == best.indices.tolist()
        assert [p for _, p in one["next"]] == pytest.approx(best.values.tolist(), rel=1e-3)
    first, second = (layer["sizes"] for layer in ways[0]["layers"])
    assert first["after"] != first["before"] != second["before"]
    assert not any(part._forward_hooks for part in model.modules())


def test_token_losses_are_those_of_the_logits() -> None:
    model = made(dense())
    tokens_BS = torch.arange(20).view(2, 10)
    found = token_losses(model, tokens_BS)
    logits_BSV, _ = model(tokens_BS)
    assert [i for i, loss in enumerate(found) if loss is None] == [0, 10]
    for b, s in ((0, 3), (1, 9)):
        right = F.cross_entropy(logits_BSV[b, s - 1 : s], tokens_BS[b, s : s + 1])
        assert found[10 * b + s] == pytest.approx(float(right.detach()), abs=1e-3)


def mean_loss(model: Decoder, windows_BS: Tensor, routing: list[Limits | None] | None = None) -> float:
    with torch.no_grad():
        logits_BSV, _ = model(windows_BS[:, :-1], routing=routing)
    return float(F.cross_entropy(logits_BSV.flatten(0, 1), windows_BS[:, 1:].flatten()))


def test_the_cost_of_an_expert_is_the_loss_without_it(data: Data) -> None:
    model = made(moe({"experts": 4, "top_k": 2}), seed=1)
    windows_BS = torch.randint(1, 300, (6, 17), generator=torch.Generator().manual_seed(0))
    found = experts_off(model, data.tokenizer, windows_BS, [0, 1])
    assert (found["windows"], found["tokens"]) == (6, 96)
    whole = mean_loss(model, windows_BS)
    for layer in (0, 1):
        for expert, cost in enumerate(found["layers"][layer]):
            off_E = torch.arange(4) == expert
            told = [Limits(off_E) if i == layer else None for i in (0, 1)]
            assert cost["cost"] == pytest.approx(mean_loss(model, windows_BS, told) - whole, abs=1e-5)
            assert cost["error"] > 0
    assert experts_off(model, data.tokenizer, windows_BS, [1])["layers"] == [found["layers"][1]]


def test_continuations_are_the_most_probable_tokens(data: Data) -> None:
    model = made(moe())
    tokens = [int(token) for token in data.heldout[:32]]
    found = continuations({"moe": model, "dense": made(dense())}, tokens, data.tokenizer)
    ids = list(tokens[:16])
    with torch.no_grad():
        for _ in range(16):  # up to the model's context
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    pieces = data.tokenizer.pieces
    assert found["prompt"] == "".join(pieces(tokens[:16]))
    assert found["teams"]["moe"].startswith("".join(pieces(ids)[16:30]))
    assert found["real"] == "".join(pieces(tokens)[16:])
    assert set(found["teams"]) == {"moe", "dense"}


@pytest.mark.parametrize(
    "router",
    [
        {"experts": 4, "top_k": 2},
        {"experts": 4, "top_k": 1, "normalize": False},
        {"experts": 4, "top_k": 2, "eval_capacity_factor": 1.0},
        {"experts": 4, "top_k": 1, "choice": "expert"},
    ],
)
@pytest.mark.filterwarnings("ignore::handful.moe.NotCausalWarning")
def test_a_lesson_of_every_kind_of_router(router: dict[str, object], data: Data) -> None:
    models = {"moe": made(moe(router)), "dense-active": made(dense())}
    shown, told = lesson(models, "moe", data, 16)
    assert json.loads(json.dumps([shown, told], allow_nan=False)) == [shown, told]
    assert len(shown["pieces"]) == 64
    computed = sum(expert >= 0 for layer in shown["experts"] for token in layer for expert in token)
    limited = router.get("choice") == "expert" or "eval_capacity_factor" in router
    assert computed <= 2 * 64 * int(str(router["top_k"]))
    assert (min(e for layer in shown["experts"] for token in layer for e in token) == -1) == limited
    assert {len(losses) for losses in told["losses"].values()} == {64}
    assert [layer["layer"] for layer in told["experts"]["layers"]] == [0, 1]
    assert all(len(layer["cards"]) == 4 for layer in told["experts"]["layers"])
    assert len(told["way"]["tokens"]) == 12
    assert told["experts"]["tokens"] <= module.READ


def test_it_is_bounded(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CARDS", 9)
    monkeypatch.setattr(module, "SCORES", 20)
    monkeypatch.setattr(module, "READ", 64)
    monkeypatch.setattr(module, "ABLATED", 400)
    _, told = lesson({"moe": made(moe(layers=5))}, "moe", data, 16)
    assert [layer["layer"] for layer in told["experts"]["layers"]] == [0, 4]  # two layers of four
    assert len(told["way"]["tokens"]) == 1  # a token has five layers' scores of four
    assert told["experts"]["tokens"] == 64
    assert told["experts"]["off_windows"] == 3  # 400 // 8 experts // 16


def test_short_texts(data: Data, tmp_path: Path) -> None:
    short = Data(**{**vars(data), "heldout": data.heldout[:18]})
    shown, told = lesson({"moe": made(moe())}, "moe", short, 16)
    assert len(shown["pieces"]) == 8  # what there is from its middle on, in two
    assert told["experts"]["off_windows"] == 1
    costs = [card["error"] for layer in told["experts"]["layers"] for card in layer["cards"]]
    assert set(costs) == {None}  # one window has no error
