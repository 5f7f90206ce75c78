"""A model as inspection sees it: our decoder and transformers' with the same weights, experts off, outputs, windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import SWITCH, dense, distance, moe
from serving import tokenizer
from torch import Tensor

from handful.encoder_decoder import EncoderDecoder
from handful.errors import ConfigError
from handful.families.io import save
from handful.inspection.collect import batches, more_nats, observe, stages
from handful.inspection.subject import Borrowed, Ours, layer_name, subject_of
from handful.inspection.texts import Document, windows
from handful.model import Decoder
from handful.routing import Limits, Told
from handful.transformers import load_causal

ROUTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sigmoid with a bias": {"score": "sigmoid", "balance_bias": True},
    "groups": {"experts": 8, "groups": 4, "top_groups": 2},
    "capacity": {"eval_capacity_factor": 1.0, "capacity_factor": 1.0},
    "expert choice": {"choice": "expert"},
}


def model_of(router: dict[str, Any] | None = None, **changes: Any) -> Decoder:
    torch.manual_seed(0)
    own = tokenizer()
    shape = {"vocab": own.vocab_size, "context": 128, "tied": False, "layers": 3} | changes
    model = Decoder(moe(router, **shape)).eval()
    model.tokenizer = own
    return model


def rows(model: Decoder, B: int = 3, S: int = 17) -> tuple[Tensor, Tensor]:
    tokens_BS = torch.randint(model.config.vocab, (B, S + 1), generator=torch.Generator().manual_seed(1))
    return tokens_BS[:, :-1], tokens_BS[:, 1:]


@pytest.mark.filterwarnings("ignore:.*not causal")
@pytest.mark.parametrize("dense_layers", [(), (1,), (2,)])
@pytest.mark.parametrize("kind", ROUTERS)
def test_an_expert_off_costs_what_the_whole_model_without_it_says(kind: str, dense_layers: tuple[int, ...]) -> None:
    model = model_of(ROUTERS[kind], ffn=24 if dense_layers else 0, dense_layers=dense_layers).double()
    subject = subject_of(model)
    tokens_BS, targets_BS = rows(model)
    base_BS, chosen = subject.run(tokens_BS, targets_BS)
    logits_BSV = model(tokens_BS)[0]
    nats = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="none")
    assert distance(base_BS.flatten(), nats) < 1e-6
    assert len(chosen) == len(subject.layers) == 3 - len(dense_layers)
    for layer in range(len(subject.layers)):
        stage = subject.before(tokens_BS, targets_BS, layer)
        assert torch.allclose(stage.nats_BS, base_BS, atol=1e-6)
        for off in ([0], [1, 3]) if kind != "capacity" else ([0],):
            off_E = torch.zeros(subject.experts[layer], dtype=torch.bool)
            off_E[off] = True
            told: list[Told | None] = [None] * len(subject.layers)
            told[layer] = Limits(off_E)
            x_BSD, _ = model.hidden_states(tokens_BS, routing=told)
            without = torch.nn.functional.cross_entropy(
                model.logits(x_BSD).flatten(0, 1), targets_BS.flatten(), reduction="none"
            )
            more_BS = subject.without(stage, off)
            assert float(more_BS.abs().max()) > 1e-4
            assert distance(more_BS.flatten(), without - nats) < 1e-4


def test_an_expert_that_nobody_chose_costs_nothing() -> None:
    model = model_of()
    with torch.no_grad():
        for layer in model.moe_layers:  # its score is below all others' whatever the token
            layer.router.bias = torch.nn.Parameter(torch.tensor([0.0, 0.0, -99.0, 0.0]))
    subject = subject_of(model)
    stage = subject.before(*rows(model), layer=1)
    assert not bool((stage.chosen_TK == 2).any())
    assert bool((subject.without(stage, [2]) == 0).all())


def theirs(model: Decoder, folder: Path) -> Any:
    save(model, folder)
    return load_causal(folder)


def test_a_model_of_transformers_is_seen_as_ours_is(tmp_path: Path) -> None:
    model = model_of()
    ours = subject_of(model)
    borrowed = subject_of(theirs(model, tmp_path), tokenizer(), "theirs")
    assert isinstance(ours, Ours)
    assert isinstance(borrowed, Borrowed)
    assert (ours.removal, borrowed.removal) == ("replaced", "removed")
    assert borrowed.layers == ours.layers == ["0", "1", "2"]
    assert (borrowed.experts, borrowed.top_k, borrowed.context) == (ours.experts, ours.top_k, ours.context)
    tokens_BS, targets_BS = rows(model)
    our_nats, our_choice = ours.run(tokens_BS, targets_BS)
    their_nats, their_choice = borrowed.run(tokens_BS, targets_BS)
    assert distance(their_nats, our_nats) < 1e-5
    for one, two in zip(our_choice, their_choice, strict=True):
        assert torch.equal(one.sort(1).values, two.sort(1).values)
    for one, two in zip(ours.seen(tokens_BS), borrowed.seen(tokens_BS), strict=True):
        assert distance(two.flatten(0, -2), one) < 1e-5
    x_TD = torch.randn(5, 16)
    assert distance(borrowed.output(1, 3, x_TD), ours.output(1, 3, x_TD)) < 1e-5


def test_an_expert_of_theirs_that_is_off_gives_nothing(tmp_path: Path) -> None:
    """As if its last matrix were zero; afterwards all is as before."""
    model = model_of()
    borrowed = subject_of(theirs(model, tmp_path), tokenizer(), "theirs")
    assert isinstance(borrowed, Borrowed)
    tokens_BS, targets_BS = rows(model)
    stage = borrowed.before(tokens_BS, targets_BS, 1)
    more_BS = borrowed.without(stage, [2])
    assert torch.equal(borrowed.run(tokens_BS, targets_BS)[0], stage.nats_BS)
    with torch.no_grad():
        list(borrowed.modules.values())[1].down_proj[2] = 0
    assert torch.allclose(borrowed.run(tokens_BS, targets_BS)[0] - stage.nats_BS, more_BS, atol=1e-5)
    assert float(more_BS.abs().max()) > 1e-4


@pytest.mark.filterwarnings("ignore:.*not causal")
def test_where_experts_choose_a_tokens_best_one_stands_first() -> None:
    model = model_of({"choice": "expert"})
    tokens_BS, targets_BS = rows(model)
    _, routings = model(tokens_BS)
    for seen_TK, routing in zip(subject_of(model).run(tokens_BS, targets_BS)[1], routings, strict=True):
        for seen, weights, dropped in zip(seen_TK, routing.weights_TK, routing.dropped_TK, strict=True):
            taken = (~dropped).nonzero().squeeze(1)
            best = taken[weights[taken].argsort(descending=True)]
            assert seen.tolist() == [*best.tolist(), *[-1] * (4 - len(best))]


def test_an_output_is_the_experts_alone() -> None:
    model = model_of()
    x_TD = torch.randn(4, 16)
    experts = model.moe_layers[0].experts
    gate, up = (x_TD @ experts.gate_up[2].T).chunk(2, -1)
    assert (
        distance(subject_of(model).output(0, 2, x_TD), (torch.nn.functional.silu(gate) * up) @ experts.down[2].T) < 1e-5
    )


def documents(count: int = 12, words: int = 40) -> list[Document]:
    return [
        Document(" ".join(f"word{(i * 7 + j) % 23}" for j in range(words)).encode(), {"folder": "ab"[i % 2]})
        for i in range(count)
    ]


@torch.no_grad()
def test_what_is_observed_is_the_routing_of_every_token() -> None:
    model = model_of()
    subject = subject_of(model)
    chosen, some = windows(documents(), subject.tokenizer, 16, 10_000, 0)
    seen, loss, whole = observe(subject, chosen, some, ["folder"])
    assert whole
    assert seen.tokens == sum(window.length for window in some)
    assert list(seen.labels["folder"]) == [document.labels["folder"] for document in chosen]
    nats, at = 0.0, 0
    for place, window in enumerate(some):
        tokens_1S = torch.tensor([window.tokens])
        logits_1SV, routings = model(tokens_1S[:, :-1])
        nats += float(torch.nn.functional.cross_entropy(logits_1SV[0], tokens_1S[0, 1:], reduction="sum"))
        part = slice(at, at + window.length)
        at += window.length
        assert seen.tokens_T[part].tolist() == list(window.tokens[:-1])
        assert set(seen.document_T[part].tolist()) == {window.document}
        assert set(seen.window_T[part].tolist()) == {place}
        assert seen.position_T[part].tolist() == list(range(window.length))
        for layer, routing in enumerate(routings):
            same = seen.experts_TK[layer][part].sort(1).values == routing.experts_TK.sort(1).values
            assert float(same.float().mean()) > 0.99  # batches of other shapes may round a tie elsewhere
    assert loss == pytest.approx(nats / seen.tokens, rel=1e-5)


def test_windows_together_are_of_one_length_and_none_is_lost() -> None:
    subject = subject_of(model_of())
    _, some = windows(documents(), subject.tokenizer, 16, 10_000, 0)
    places = []
    for at, tokens_BS in batches(some):
        assert {some[place].length for place in at} == {tokens_BS.shape[1] - 1}
        places += at
    assert sorted(places) == list(range(len(some)))


def test_costs_are_summed_by_document() -> None:
    subject = subject_of(model_of())
    chosen, some = windows(documents(), subject.tokenizer, 16, 10_000, 0)
    more_D = more_nats(subject, stages(subject, some, 0), len(chosen), [1])
    for document in (0, 5):
        mine = [window for window in some if window.document == document]
        alone_D = more_nats(subject, stages(subject, mine, 0), len(chosen), [1])
        assert float(more_D[document]) == pytest.approx(float(alone_D[document]), abs=1e-3)


def test_a_ctrl_c_while_reading_keeps_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handful.inspection.collect.TOKENS", 64)
    subject = subject_of(model_of())
    chosen, some = windows(documents(words=80), subject.tokenizer, 16, 10_000, 0)

    def press(at: int) -> Any:
        def told(done: int, total: int) -> None:
            if done >= at:
                raise KeyboardInterrupt

        return told

    seen, _, whole = observe(subject, chosen, some, ["folder"], press(2500))
    assert not whole
    assert 2500 <= seen.tokens < 2600
    assert 4 <= seen.documents < 12
    assert sorted(set(seen.document_T.tolist())) == list(range(seen.documents))
    with pytest.raises(KeyboardInterrupt):
        observe(subject, chosen, some, ["folder"], press(1))


def test_the_name_of_a_layer() -> None:
    assert layer_name("model.layers.13.mlp.experts") == "13"
    assert layer_name("tower.0.layers.3.experts") == "tower.0.layers.3.experts"
    assert layer_name("experts") == "experts"


def test_what_is_no_mixture_is_refused_in_a_line(tmp_path: Path) -> None:
    small = Decoder(dense(vocab=tokenizer().vocab_size))
    with pytest.raises(ConfigError, match=r"^twin: a dense model; inspect is for mixtures of experts$"):
        subject_of(small, tokenizer(), "twin")
    with pytest.raises(ConfigError, match="an encoder-decoder; inspect is for decoders"):
        subject_of(EncoderDecoder(SWITCH), tokenizer())
    with pytest.raises(ConfigError, match="no tokenizer"):
        subject_of(Decoder(moe()), None)
    with pytest.raises(ConfigError, match="no experts that can be reached"):
        subject_of(theirs(small, tmp_path), tokenizer())
