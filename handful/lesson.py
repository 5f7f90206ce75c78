"""What a trained mixture does with a text, in numbers that a page can show: the way of a token through the layers, the
experts one by one, one word in two contexts, and each team's loss and continuation.

All of it is read off after training, on held-out text, and is bounded: the constants below say by what.

Legend: B windows · S tokens of one · T = B·S tokens · D model width · L MoE layers · E experts · K experts per token
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from handful.block import Block
from handful.data import Data, heldout_batches
from handful.generate import generate_tokens
from handful.inspection.ablation import Ablated, costs
from handful.inspection.collect import more_nats, stages
from handful.inspection.subject import subject_of
from handful.inspection.texts import Window
from handful.model import Decoder
from handful.moe import MoE
from handful.observe import coactivation, expert_load, used
from handful.routing import Routing
from handful.sampling import Sampling
from handful.text import Tokenizer

__all__ = [
    "cards",
    "continuations",
    "experts_off",
    "lesson",
    "sample",
    "token_losses",
    "way",
    "word",
]

SHOWN = 256  # tokens of the text that is shown, in two sequences
WINDOW = 256  # tokens in a row that are read
READ = 4096  # tokens that the cards and the word are drawn from
ABLATED = 400_000  # tokens that pass without an expert, all experts together: a few seconds of the default model
ABLATED_EACH = 2048  # tokens for one expert
CARDS = 512  # experts with a card: of as many layers as have no more together, one at least
SCORES = 16_384  # router scores of the ways that are told: 12 tokens at most, one at least
WAYS = 12
VALUES = 6  # of a vector, to be shown
TOP = 6  # tokens of a card
PARTNERS = 3
OCCURRENCES = 32  # of a word that are compared
WORDS = 200  # that are tried
MADE = 48  # tokens of a continuation
LEVEL = 0.05  # false discoveries among the costs that are called beyond noise

Doc = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Functions of routings.


def cards(routing: Routing, tokens_T: Sequence[int]) -> list[Doc]:
    """Of each expert of a layer its load, the tokens it computed most often, and its partners.

    tokens     [token, how often here, how often in the text]
    partners   [expert, the share of this expert's tokens that it computed too, and its share of all tokens]
    """
    used_TE = used(routing)
    load_E, together_EE = expert_load(routing).tolist(), coactivation(routing)
    in_text = Counter(tokens_T)
    found = []
    for expert, load in enumerate(load_E):
        mine = Counter(tokens_T[place] for place in used_TE[:, expert].nonzero().flatten().tolist())
        # The more of a token's occurrences, the more the expert's own; then the lower id, so that ties are decided.
        top = sorted(mine, key=lambda token: (-mine[token], in_text[token], token))[:TOP]
        tokens = float(together_EE[expert, expert])
        with_others_E = together_EE[expert].clone()
        with_others_E[expert] = 0
        best = with_others_E.topk(min(PARTNERS, len(load_E)))
        found.append(
            {
                "load": round(load, 6),
                "tokens": [[token, mine[token], in_text[token]] for token in top],
                "partners": [
                    [other, round(count / tokens, 4), round(float(together_EE[other, other]) / len(tokens_T), 4)]
                    for other, count in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                    if count
                ],
            }
        )
    return found


def word(
    tokens_BS: Tensor, routings: Sequence[Routing], tokenizer: Tokenizer, asked: str = "Paris"
) -> tuple[Doc, tuple[int, int]] | None:
    """A word whose two occurrences share the fewest experts, and where they are in the flattened text.

    The word asked for, if the text has it twice. Else the most frequent word of three letters at least, and one token,
    with two occurrences that share no more than half of their assignments; if none has, the one that comes nearest. Two
    that are picked for being far apart say little of the rest, so the document has the means beside them: over all
    pairs of the word's (32 at most), and over all pairs of tokens of the text. None: no word stands there twice.
    """
    S = tokens_BS.shape[1]
    used_TX = torch.cat([used(routing) for routing in routings], dim=1).float()
    flat = tokens_BS.flatten().tolist()
    each = float(used_TX.sum()) / len(flat)  # assignments of a token, in all layers
    best: tuple[float, str, list[int], Tensor] | None = None
    for text, places in _words(flat, S, tokenizer, asked):
        mine_nX = used_TX[places]
        shared_nn = mine_nX @ mine_nX.T
        shared_nn.fill_diagonal_(math.inf)
        least = float(shared_nn.min())
        if best is None or least < best[0] or text.strip() == asked:
            best = least, text, places, shared_nn
        if least <= each / 2 or text.strip() == asked:
            break
    if best is None:
        return None
    least, text, places, shared_nn = best
    first, second = divmod(int(shared_nn.argmin()), len(places))
    pairs = torch.triu(torch.ones_like(shared_nn), 1).bool()
    total_X = used_TX.sum(0)
    any_pair = float(total_X.square().sum() - used_TX.sum()) / max(1, len(flat) * (len(flat) - 1))
    found = {
        "word": text,
        "asked": asked,
        "count": len(places),
        "shared": int(least),
        "of": round(each),
        "mean": round(float(shared_nn[pairs].mean()), 3),
        "any": round(any_pair, 3),
    }
    return found, (places[first], places[second])


def _words(flat: Sequence[int], S: int, tokenizer: Tokenizer, asked: str) -> list[tuple[str, list[int]]]:
    """The words to try and the places of their last tokens: the one asked for, and the others by frequency. A place has
    a token before it in its window, which it can be told by."""
    found = []
    for text in (f" {asked}", asked):
        ids = tokenizer.encode(text)
        ends = [
            end
            for end in range(len(ids), len(flat))
            if flat[end + 1 - len(ids) : end + 1] == ids and end % S >= len(ids)
        ]
        if len(ends) > 1:
            found.append((text, ends[:OCCURRENCES]))
    places: defaultdict[int, list[int]] = defaultdict(list)
    for place, token in enumerate(flat):
        if place % S:
            places[token].append(place)
    tried = 0
    for token in sorted(places, key=lambda token: (-len(places[token]), token)):
        if len(places[token]) < 2 or tried == WORDS:
            break
        text = tokenizer.token_bytes(token, special=False).decode("utf-8", "replace")
        if re.fullmatch(r" ?[^\W\d_]{3,}", text):
            found.append((text, places[token][:OCCURRENCES]))
            tried += 1
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The model, run.


@torch.no_grad()
def way(model: Decoder, tokens_S: Sequence[int], places: Sequence[int]) -> list[Doc]:
    """What happens to some tokens of a text, layer by layer, in the numbers of one forward pass.

    scores    of all experts; experts, weights: the chosen ones'.
    outputs   of each chosen expert the first values of its output, before its weight; blend, those of the layer's.
    shares    of the blend: of each chosen expert its part along the blend, so that they sum to 1; the last one, where
              there are shared experts, is theirs.
    sizes     Euclidean norms: of each weighted output, of the blend, of the stream before it and after it.
    next      the most probable tokens that follow, [token, probability].
    """
    seen: list[tuple[Tensor, Tensor, Routing]] = []
    streams: list[Tensor] = []
    blocks = [block for block in model.layers if isinstance(block, Block) and isinstance(block.ffn, MoE)]
    hooks = []
    for block in blocks:
        assert isinstance(block, Block)
        hooks.append(block.ffn_norm.register_forward_hook(lambda _m, given, _y: streams.append(given[0][0])))
        hooks.append(
            block.ffn.register_forward_hook(lambda _m, given, made: seen.append((given[0][0], made[0][0], made[1])))
        )
    try:
        tokens_BS = torch.tensor([list(tokens_S)], device=model.embed.weight.device)
        logits_SV = model(tokens_BS)[0][0].float()
    finally:
        for hook in hooks:
            hook.remove()
    ways = []
    for place in places:
        layers = []
        for block, stream_SD, (x_SD, y_SD, routing) in zip(blocks, streams, seen, strict=True):
            layers.append(_step(block, stream_SD[place], x_SD[place : place + 1], y_SD[place], routing, place))
        top = logits_SV[place].softmax(-1).topk(min(5, model.config.vocab))
        following = [[t, _brief(p)] for t, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        ways.append({"at": place, "layers": layers, "next": following})
    return ways


def _step(block: Block, stream_D: Tensor, x_1D: Tensor, y_D: Tensor, routing: Routing, place: int) -> Doc:
    moe = block.ffn
    assert isinstance(moe, MoE)
    mine = routing.rows(place, place + 1)
    kept_K = mine.computed_TK[0]
    experts, weights_k = mine.experts_TK[0][kept_K], mine.weights_TK[0][kept_K]
    outputs = []
    for expert in experts.tolist():
        one_11 = torch.ones(1, 1, device=x_1D.device)
        alone = Routing(mine.logits_TE, mine.scores_TE, torch.full_like(mine.experts_TK[:, :1], expert), one_11)
        outputs.append(moe.experts(x_1D, alone)[0])
    weighted = [weight * output for weight, output in zip(weights_k.tolist(), outputs, strict=True)]
    if moe.shared is not None:
        weighted.append(y_D - sum(weighted, torch.zeros_like(y_D)))
    norm = y_D.float().square().sum().clamp_min(1e-30)
    return {
        "scores": [_brief(score) for score in mine.scores_TE[0].tolist()],
        "experts": experts.tolist(),
        "weights": [_brief(weight) for weight in weights_k.tolist()],
        "outputs": [_values(output) for output in outputs],
        "blend": _values(y_D),
        "shares": [_brief(float((part * y_D).float().sum() / norm)) for part in weighted],
        "sizes": {
            "parts": [_size(part) for part in weighted],
            "blend": _size(y_D),
            "before": _size(stream_D),
            "after": _size(stream_D + block.scaled(y_D)),
        },
    }


def _brief(value: float) -> float:
    return float(f"{value:.4g}")


def _values(x_D: Tensor) -> list[float]:
    return [_brief(value) for value in x_D[:VALUES].tolist()]


def _size(x_D: Tensor) -> float:
    return _brief(float(x_D.float().norm()))


@torch.no_grad()
def token_losses(model: Decoder, tokens_BS: Tensor) -> list[float | None]:
    """The nats of every token, given those before it in its sequence; None for the first of each."""
    logits_BSV = model(tokens_BS.to(model.embed.weight.device))[0].float()
    nats = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten().to(logits_BSV.device),
                           reduction="none").view(len(tokens_BS), -1)  # fmt: skip
    return [loss for row in nats.tolist() for loss in (None, *(round(value, 4) for value in row))]


@torch.no_grad()
def sample(model: Decoder, tokens_BS: Tensor, tokenizer: Tokenizer) -> Doc:
    """A text with the experts of every token, -1 for an assignment that was not computed."""
    _, routings = model(tokens_BS.to(model.embed.weight.device))
    experts = [r.experts_TK.masked_fill(~r.computed_TK, -1) for r in routings]
    return {
        "pieces": tokenizer.pieces(tokens_BS.flatten().tolist()),
        "layers": list(model.config.moe_layers),
        "experts": [experts_TK.tolist() for experts_TK in experts],
        "weights": [[[round(w, 4) for w in row] for row in r.weights_TK.tolist()] for r in routings],
    }


def continuations(models: Mapping[str, Decoder], tokens_S: Sequence[int], tokenizer: Tokenizer) -> Doc:
    """How each model goes on from the beginning of a text, the most probable token each time, and how it really does.

    The prompt is the first half, 32 tokens at most.
    """
    begin = max(1, min(32, len(tokens_S) // 2))
    prompt = list(tokens_S[:begin])

    def text(made: Sequence[int]) -> str:
        return "".join(tokenizer.pieces([*prompt, *made])[begin:])

    made = {}
    for name, model in models.items():
        most = min(MADE, model.config.context - begin)
        made[name] = text(list(generate_tokens(model, prompt, most, Sampling(temperature=0))))
    real = text(tokens_S[begin : begin + MADE])
    return {"prompt": "".join(tokenizer.pieces(prompt)), "real": real, "teams": made}


def experts_off(model: Decoder, tokenizer: Tokenizer, windows_BS: Tensor, layers: Sequence[int]) -> Doc:
    """What the loss is more when an expert is off and its tokens take the next best one.

    windows_BS   S + 1 tokens each, whose last one is predicted alone; as many are read, evenly spread, as the bounds
                 allow.
    layers       the places of the MoE layers that are asked about.

    The error is that over windows, of paired differences; `beyond` noise is judged for all experts together
    (Benjamini-Hochberg at 0.05).
    """
    subject = subject_of(model, tokenizer)
    length = windows_BS.shape[1] - 1
    each = min(ABLATED_EACH, ABLATED // max(1, sum(subject.experts[layer] for layer in layers)))
    rows = [windows_BS[place].tolist() for place in _spread_out(len(windows_BS), max(2, each // length))]
    windows = [Window(i, tuple(row)) for i, row in enumerate(rows)]
    more = []
    for layer in layers:
        staged = stages(subject, windows, layer)
        alone = [more_nats(subject, staged, len(windows), [expert]) for expert in range(subject.experts[layer])]
        more.append(torch.stack(alone))
    tokens_D = torch.full((len(windows),), float(length), dtype=torch.float64)
    found = [
        [{"cost": _maybe(e["cost"]), "error": _maybe(e["error"]), "beyond": e["beyond"]} for e in layer]
        for layer in costs(Ablated(more, tokens_D, math.nan, True), LEVEL)
    ]
    return {"tokens": len(windows) * length, "windows": len(windows), "layers": found}


def _maybe(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def lesson(models: Mapping[str, Decoder], name: str, data: Data, context: int) -> tuple[Doc, Doc]:
    """The sample and the lesson of a comparison's document. name: the mixture that is looked at; context: the tokens of
    a sequence in training."""
    model, tokenizer = models[name], data.tokenizer
    shown_BS = _shown(data, min(model.config.context, SHOWN // 2))
    told = sample(model, shown_BS, tokenizer)
    first = shown_BS[0].tolist()
    layers = list(model.config.moe_layers)
    read = heldout_batches(data.heldout, 1, min(context, WINDOW), READ)
    windows_BS = torch.cat([torch.cat([inputs, targets[:, -1:]], 1) for inputs, targets in read])
    read_BS = windows_BS[:, :-1]
    with torch.no_grad():
        device = model.embed.weight.device
        passes = [model(window_S.unsqueeze(0).to(device))[1] for window_S in read_BS]
    routings = [Routing.joined(layer) for layer in zip(*passes, strict=True)]
    flat = read_BS.flatten().tolist()
    found = word(read_BS, routings, tokenizer)
    experts = model.config.router.experts if model.config.router else 0
    ways = way(model, first, _run_of_words(told["pieces"][: len(first)], SCORES // (len(layers) * experts)))
    for one in ways:
        one["next"] = [[_shown_as(tokenizer, token), p] for token, p in one["next"]]
    return told, {
        "way": {"layers": layers, "tokens": ways},
        "word": None if found is None else found[0] | {"places": _places(found[1], read_BS, routings, tokenizer)},
        "experts": _experts(model, tokenizer, routings, flat, windows_BS),
        "losses": {each: token_losses(other, shown_BS) for each, other in models.items()},
        "continuations": continuations(models, first, tokenizer),
    }


def _shown(data: Data, length: int) -> Tensor:
    """Two sequences from the middle of the held-out text; one, of what there is, where it is short."""
    middle = len(data.heldout) // 2
    tokens = [int(t) for t in data.heldout[middle : middle + 2 * length]]
    return torch.tensor(tokens[: len(tokens) // 2 * 2]).view(2, -1) if len(tokens) >= 4 else torch.tensor([tokens])


def _run_of_words(pieces: Sequence[str], most: int) -> list[int]:
    """The places of some tokens in a row, with the most letters, and where there is room not the first eight."""
    count = max(1, min(WAYS, most, len(pieces)))
    starts = range(min(8, len(pieces) - count), len(pieces) - count + 1)

    def letters(start: int) -> int:
        return sum(char.isalpha() for piece in pieces[start : start + count] for char in piece)

    start = max(starts, key=lambda start: (letters(start), -start))
    return list(range(start, start + count))


def _places(places: tuple[int, int], read_BS: Tensor, routings: Sequence[Routing], tokenizer: Tokenizer) -> list[Doc]:
    """Two occurrences: what stands before and after each, and what was chosen in each layer."""
    S = read_BS.shape[1]
    found = []
    for place in places:
        window, at = divmod(place, S)
        pieces = tokenizer.pieces(read_BS[window].tolist())
        found.append(
            {
                "before": "".join(pieces[max(0, at - 16) : at]),
                "after": "".join(pieces[at + 1 : at + 5]),
                "experts": [used(r.rows(place, place + 1))[0].nonzero().flatten().tolist() for r in routings],
            }
        )
    return found


def _experts(
    model: Decoder, tokenizer: Tokenizer, routings: Sequence[Routing], flat: Sequence[int], windows_BS: Tensor
) -> Doc:
    layers = model.config.moe_layers
    kept = _spread_out(len(layers), max(1, CARDS // routings[0].experts))
    off = experts_off(model, tokenizer, windows_BS, kept)
    found = []
    for place, without in zip(kept, off["layers"], strict=True):
        of_layer = cards(routings[place], flat)
        for card, cost in zip(of_layer, without, strict=True):
            card["tokens"] = [[_shown_as(tokenizer, token), here, of] for token, here, of in card["tokens"]]
            card |= cost
        found.append({"layer": layers[place], "cards": of_layer})
    return {"tokens": len(flat), "off_tokens": off["tokens"], "off_windows": off["windows"], "layers": found}


def _spread_out(count: int, most: int) -> list[int]:
    """At most so many of some places, evenly spread, the first and the last among them."""
    many = min(count, most)
    return sorted({round(i * (count - 1) / max(1, many - 1)) for i in range(many)})


def _shown_as(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode("utf-8", "replace")
