"""Routing as an output of the API: told, replayed, limited; and what is inside the model."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import dense
from serving import Served, chat_model, serving

from handful.engine import Engine, Request
from handful.experts.quantize_model import quantize_model
from handful.families.io import save
from handful.memory import load
from handful.model import Decoder
from handful.observe import max_vio
from handful.routing_options import RoutingOptions
from handful.sampling import Sampling
from handful.server.inside import weight_bytes

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = [5, 1, 7, 2, 9, 3]
SHAPE: dict[str, Any] = {"router": {"experts": 6, "top_k": 3}, "layers": 3, "dense_layers": (1,), "ffn": 8}


def small(**changes: Any) -> Decoder:
    return chat_model(torch.float64, context=64, **{**SHAPE, **changes})


@pytest.fixture(scope="module")
def model() -> Decoder:
    return small()


@pytest.fixture(scope="module")
def served(model: Decoder) -> Iterator[Served]:
    with serving(model) as found:
        yield found


def npy(text: str) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    return found


def coded(values: Any) -> str:
    file = io.BytesIO()
    np.save(file, values)
    return base64.b64encode(file.getvalue()).decode()


def choice(served: Served, path: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    asked = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hello"}]}
    body = {**asked, "max_tokens": 5, "temperature": 0, "ignore_eos": True, **body}
    found: dict[str, Any] = served.post(path, **body)["choices"][0]
    return found


def alone(model: Decoder, **options: Any) -> tuple[list[int], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens, experts and weights as the engine tells them."""
    engine = Engine(model)
    asked = RoutingOptions(record=True, **options)
    job = engine.submit(Request(prompt=PROMPT, max_tokens=5, sampling=Sampling(temperature=0), routing=asked))
    parts = []
    while engine.busy:
        parts += [delta.routed for delta in engine.step() if delta.routed is not None]
    experts = [np.concatenate([part.experts_TK[i].numpy() for part in parts]) for i in range(len(model.moe_layers))]
    weights = [np.concatenate([part.weights_TK[i].numpy() for part in parts]) for i in range(len(model.moe_layers))]
    return job.made, np.stack(experts, axis=1), np.stack(weights, axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Told.


def test_whole(model: Decoder, served: Served) -> None:
    made, experts, weights = alone(model)
    found = choice(served, return_routed_experts=True, routed_weights=True, return_token_ids=True)
    assert found["token_ids"] == made
    assert found["prompt_token_ids"] == PROMPT
    told = npy(found["routed_experts"])
    assert (told.dtype, told.shape) == (np.uint8, (len(PROMPT) + 5 - 1, 2, 3))
    assert (told == experts).all()
    assert npy(found["routed_weights"]).dtype == np.float16
    assert (npy(found["routed_weights"]) == weights).all()
    later = choice(served, return_routed_experts=True, routed_experts_prompt_start=4)
    assert (npy(later["routed_experts"]) == experts[4:]).all()
    beyond = choice(served, return_routed_experts=True, routed_experts_prompt_start=99)
    assert (npy(beyond["routed_experts"]) == experts[len(PROMPT) :]).all()
    assert "routed_weights" not in later
    plain = choice(served)
    assert not {"routed_experts", "routed_weights", "token_ids", "prompt_token_ids"} & set(plain)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_streamed(model: Decoder, served: Served, path: str) -> None:
    """A chunk for each token; the first has the prompt's routing, each later one that of the token before its own."""
    asked = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hello"}]}
    body = {**asked, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "return_routed_experts": True}
    whole = served.post(path, **body, return_token_ids=True, n=2)
    events = served.events(path, **body, return_token_ids=True, n=2)
    for index, want in enumerate(whole["choices"]):
        chunks = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        prompt = [one["prompt_token_ids"] for one in (*chunks, *events) if "prompt_token_ids" in one]
        wanted = want["prompt_token_ids"] if path == COMPLETIONS else whole["prompt_token_ids"]
        assert prompt[0] == wanted
        told = [one for one in chunks if one.get("token_ids")]
        assert [len(one["token_ids"]) for one in told] == [1] * 5
        assert [token for one in told for token in one["token_ids"]] == want["token_ids"]
        parts = [npy(one["routed_experts"]) for one in told]
        assert [len(part) for part in parts] == [len(wanted), 1, 1, 1, 1]
        assert (np.concatenate(parts) == npy(want["routed_experts"])).all()


def test_types_are_the_smallest_that_fit() -> None:
    for experts, kind in ((256, np.uint8), (257, np.uint16)):
        with serving(small(router={"experts": experts, "top_k": 2}, expert_width=2)) as served:
            told = npy(choice(served, return_routed_experts=True)["routed_experts"])
            assert (told.dtype, told.shape[2]) == (kind, 2)


@pytest.mark.filterwarnings("ignore:.*not causal")
@pytest.mark.parametrize("router", [{"eval_capacity_factor": 0.5}, {"choice": "expert"}])
def test_what_was_not_computed_is_told_as_such(router: dict[str, Any]) -> None:
    """And is replayed like the rest."""
    model = small(router=router)
    with serving(model) as served:
        found = choice(served, return_routed_experts=True, routed_weights=True, logprobs=1)
        told = npy(found["routed_experts"])
        assert ((told >= 4) & (told < 8)).any()
        assert (told < 4).any()
        again = choice(
            served,
            return_routed_experts=True,
            routed_weights=True,
            logprobs=1,
            replay_routed_experts=found["routed_experts"],
        )
        assert again == found


# ---------------------------------------------------------------------------------------------------------------------
# Replayed, and limited.


def test_replayed(model: Decoder, served: Served) -> None:
    want = choice(served, return_routed_experts=True, logprobs=2)
    assert choice(served, return_routed_experts=True, logprobs=2, replay_routed_experts=want["routed_experts"]) == want
    other = (npy(want["routed_experts"]) + 1) % 6
    forced = choice(served, return_routed_experts=True, replay_routed_experts=coded(other[:8].astype(np.uint16)))
    assert (npy(forced["routed_experts"])[:8] == other[:8]).all()


def test_limited(model: Decoder, served: Served) -> None:
    made, experts, _ = alone(model, experts_off={0: [1, 2], 2: [0]}, top_k=2)
    options: dict[str, Any] = {"experts_off": {"0": [1, 2], "2": [0]}, "top_k_experts": 2}
    found = choice(served, return_routed_experts=True, return_token_ids=True, **options)
    assert found["token_ids"] == made
    told = npy(found["routed_experts"])
    assert told.shape[2] == 2
    assert (told == experts).all()
    assert not np.isin(told[:, 0], [1, 2]).any()
    assert choice(served, CHAT, **options)["message"]["content"] != choice(served, CHAT)["message"]["content"]


def test_it_costs_nothing_where_nobody_asks(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is recorded, nor the routers told anything."""
    seen: list[Any] = []
    model = served.server.model
    real = model.hidden_states

    def hidden_states(*args: Any, routing: Any, **more: Any) -> Any:
        seen.append(routing)
        return real(*args, routing=routing, **more)

    monkeypatch.setattr(model, "hidden_states", hidden_states)
    monkeypatch.setattr("handful.engine._record", lambda *_: pytest.fail("recorded"))
    choice(served)
    choice(served, top_k_experts=None, experts_off={}, return_routed_experts=False)
    assert seen
    assert all(one is None for one in seen)


@pytest.mark.parametrize(
    ("param", "body", "said"),
    [
        ("experts_off", {"experts_off": {"1": [0]}}, "layer 1 has no experts; those that have: 0, 2"),
        ("experts_off", {"experts_off": {"x": [0]}}, "'x': the number of a layer"),
        ("experts_off", {"experts_off": {"0": [0, 1, 2, 3]}}, "layer 0 would have 2 of 6 experts: it takes 3"),
        ("experts_off", {"experts_off": {"0": [-1]}}, "greater than or equal to 0"),
        ("experts_off", {"experts_off": [1]}, "valid dictionary"),
        ("top_k_experts", {"top_k_experts": 4}, "from 1 to the model's own 3"),
        ("top_k_experts", {"top_k_experts": 0}, "greater than or equal to 1"),
        ("routed_weights", {"routed_weights": True}, "needs return_routed_experts = true"),
        ("routed_experts_prompt_start", {"routed_experts_prompt_start": 3}, "needs return_routed_experts = true"),
        ("replay_routed_experts", {"replay_routed_experts": "?"}, "is not base64 of a .npy file"),
        ("replay_routed_experts", {"replay_routed_experts": "AAAA"}, "is not base64 of a .npy file"),
        ("replay_routed_experts", {"replay_routed_experts": coded(np.zeros((2, 2, 3)))}, "unsigned integers of shape"),
        ("replay_routed_experts", {"replay_routed_experts": coded(np.zeros((2, 3), np.uint8))}, "of shape (2, 3)"),
        ("replay_routed_experts", {"replay_routed_experts": coded(np.full((2, 2, 3), 9, np.uint8))}, "names expert 9"),
        ("replay_routed_experts", {"replay_routed_experts": coded(np.full((2, 2, 3), 6, np.uint8))}, "names expert 6"),
        ("replay_routed_experts", {"replay_routed_experts": coded(np.zeros((2, 2, 3), np.uint8))}, "expert twice"),
        ("replay_routed_experts", {"replay_routed_experts": coded(np.zeros((2, 2, 1), np.uint8))}, "request takes 3"),
        ("replay_routed_experts", {"replay_routed_experts": coded(np.zeros((1, 2, 3), object))}, "is not base64 of"),
        ("replay_routed_experts",
         {"replay_routed_experts": coded(np.zeros((2, 2, 3), np.uint8)), "prompt": [[1], [2]]}, "2 prompts: it is of"),
    ],
)  # fmt: skip
def test_refused(served: Served, param: str, body: dict[str, Any], said: str) -> None:
    error = served.post(COMPLETIONS, 400, **{"prompt": PROMPT, "max_tokens": 5, **body})["error"]
    assert error["param"] == param
    assert said in error["message"]


def test_a_file_that_claims_more_than_it_has(served: Served) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 2, 3)}
    )  # fmt: skip
    text = base64.b64encode(file.getvalue()).decode()
    error = served.post(COMPLETIONS, 400, prompt=PROMPT, replay_routed_experts=text)["error"]
    assert error["message"] == "replay_routed_experts: is not base64 of a .npy file"


def test_answers_are_bounded(model: Decoder) -> None:
    with serving(model, max_routed=100) as served:
        body = {"prompt": PROMPT, "return_routed_experts": True, "temperature": 0}
        assert served.post(COMPLETIONS, **body, max_tokens=10)
        error = served.post(COMPLETIONS, 400, **body, max_tokens=11)["error"]
        assert error["param"] == "return_routed_experts"
        assert error["message"].startswith("return_routed_experts: up to 102 bytes: at most 100 a request")
        assert served.post(COMPLETIONS, **body, max_tokens=11, routed_experts_prompt_start=1)
        assert served.post(COMPLETIONS, 400, **body, max_tokens=5, routed_weights=True)
        assert served.post(COMPLETIONS, 400, **body, max_tokens=5, n=2)


def test_a_dense_model_has_no_routing() -> None:
    model = chat_model()
    tokenizer = model.tokenizer
    model = Decoder(dense(vocab=model.config.vocab, context=64)).eval()
    model.tokenizer = tokenizer
    with serving(model) as served:
        for name, value in (("return_routed_experts", True), ("experts_off", {"0": [1]}), ("top_k_experts", 1)):
            error = served.post(COMPLETIONS, 400, prompt=PROMPT, **{name: value})["error"]
            assert error["param"] == name
            assert error["message"] == f"{name}: the model is dense, and has no router"
        facts = served.http.get("/routing/model").json()
        assert (facts["experts"], facts["moe_layers"], facts["score"]) == (0, [], None)
        assert served.http.get("/routing/experts").json() == {"layers": {}}
        way = served.post("/routing/path", tokens=PROMPT)
        assert (way["token"], way["layers"], len(way["next"])) == (PROMPT[-1], [], 10)
        assert served.post("/routing/path", 400, tokens=PROMPT, top_k_experts=1)["error"]["param"] == "top_k_experts"


# ---------------------------------------------------------------------------------------------------------------------
# What was found in memory.


def test_found_tokens_are_told_and_metered() -> None:
    with serving(small()) as served:
        body = {"prompt": list(range(40)), "max_tokens": 1}
        first, second = (served.post(COMPLETIONS, **body)["usage"] for _ in range(2))
        assert first["prompt_tokens_details"] == {"cached_tokens": 0}
        assert second["prompt_tokens_details"] == {"cached_tokens": 39}
        both = served.post(COMPLETIONS, **{**body, "n": 3})["usage"]
        assert both["prompt_tokens_details"] == {"cached_tokens": 39}
        metrics = served.metrics()
        assert metrics["handful:prefix_cache_queries_total", ""] == 5 * 40
        assert metrics["handful:prefix_cache_hits_total", ""] == 4 * 39
        assert metrics["handful:prompt_tokens_total", ""] == 5 * 40


# ---------------------------------------------------------------------------------------------------------------------
# Inside.


def test_the_models_shape(model: Decoder, served: Served) -> None:
    facts = served.http.get("/routing/model").json()
    numbers = sum(p.numel() for p in model.parameters())
    assert facts["moe_layers"] == [0, 2]
    assert (facts["experts"], facts["top_k"], facts["score"], facts["chat"]) == (6, 3, "softmax", True)
    assert facts["parameters"]["total"] == numbers
    expert = model.moe_layers[0].experts.gate_up[0].numel() + model.moe_layers[0].experts.down[0].numel()
    assert facts["parameters"]["active"] == numbers - 2 * 3 * expert
    assert facts["bytes"]["total"] == 8 * numbers
    assert facts["bytes"]["token"] == 8 * (numbers - 2 * 3 * expert - model.embed.weight.numel())
    assert facts["memory"] is None


def test_bytes_of_codes() -> None:
    """What is packed is counted packed; a tied embedding is the output layer, and is read whole."""
    model = chat_model(torch.bfloat16, width=64, expert_width=64, tied=True)
    plain = weight_bytes(model)
    assert plain["total"] == 2 * sum(p.numel() for p in model.parameters())
    quantize_model(model, bits=4)
    packed = weight_bytes(model)
    assert packed["total"] < 0.6 * plain["total"]
    experts = sum(tensor.nbytes for layer in model.moe_layers for tensor in layer.experts.buffers())
    assert packed["total"] - packed["token"] == pytest.approx(experts / 2, abs=1)  # 2 of 4


def test_the_load_of_every_expert(model: Decoder) -> None:
    with serving(model) as served:
        empty = served.http.get("/routing/experts").json()["layers"]
        assert {name: layer["load"] for name, layer in empty.items()} == {"0": [0] * 6, "2": [0] * 6}
        told = npy(choice(served, return_routed_experts=True)["routed_experts"])
        layers = served.http.get("/routing/experts").json()["layers"]
        for index, layer in enumerate(layers.values()):
            counts = np.bincount(told[:, index].flatten(), minlength=6)
            assert layer["load"] == pytest.approx(counts / counts.sum(), abs=0.01)
            assert layer["assignments"] == pytest.approx(counts.sum(), abs=0.2)
            assert layer["places"] is None
            vio = served.metrics()["handful:expert_load_max_vio", list(layers)[index]]
            assert vio == pytest.approx(max_vio(torch.tensor(layer["load"])), abs=1e-3)


def test_where_experts_are_under_a_budget(tmp_path: Path) -> None:
    model = small()
    save(model.float(), tmp_path / "model")
    size = sum(p.nbytes for p in model.moe_layers[0].experts.parameters()) // 6
    found, store = load(tmp_path / "model", memory_bytes=sum(p.nbytes for p in model.parameters()) - 4 * size)
    assert store is not None
    assert isinstance(found, Decoder)
    with store, serving(found, store=store) as served:
        facts = served.http.get("/routing/model").json()
        assert facts["memory"] == {"slots": store.slots, "experts": 12}
        assert facts["bytes"]["total"] >= sum(p.nbytes for p in model.parameters())
        choice(served)
        layers = served.http.get("/routing/experts").json()["layers"]
        places = "".join(layer["places"] for layer in layers.values())
        assert set(places) <= set("mdf")
        assert len(places) == 12
        assert 0 < places.count("m") <= store.slots
        assert "d" in places


def test_the_way_of_a_token(model: Decoder, served: Served) -> None:
    """As the model itself says it: of the last token, beside those before it; also within limits."""
    whole = served.post("/routing/path", tokens=PROMPT)
    with torch.inference_mode():
        logits_BSV, routings = model(torch.tensor([PROMPT]))
    assert whole["token"] == PROMPT[-1]
    assert [layer["layer"] for layer in whole["layers"]] == [0, 2]
    for layer, routing in zip(whole["layers"], routings, strict=True):
        assert layer["scores"] == pytest.approx(routing.scores_TE[-1].tolist(), abs=1e-5)
        assert layer["experts"] == routing.experts_TK[-1].tolist()
        assert layer["weights"] == pytest.approx(routing.weights_TK[-1].tolist(), abs=1e-5)
    best = logits_BSV[0, -1].softmax(-1).topk(10)
    assert [one["token"] for one in whole["next"]] == best.indices.tolist()
    assert [one["probability"] for one in whole["next"]] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert all(isinstance(one["text"], str) for one in whole["next"])
    off = served.post("/routing/path", tokens=PROMPT, experts_off={"0": whole["layers"][0]["experts"]})
    assert not set(off["layers"][0]["experts"]) & set(whole["layers"][0]["experts"])
    fewer = served.post("/routing/path", tokens=PROMPT, top_k_experts=1)
    assert [len(layer["experts"]) for layer in fewer["layers"]] == [1, 1]
    assert served.post("/routing/path", 400, tokens=[])["error"]["param"] == "tokens"
    assert served.post("/routing/path", 400, tokens=[99999])["error"]["param"] == "prompt"
    assert json.dumps(whole)
