"""What was made, in OpenAI's shapes: completions and chats, whole or in chunks.

A chunk has what a whole answer has, of fewer tokens: so both are made of `Piece`s, and a whole one of all its pieces.
"""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from handful.engine import Delta, Finish
from handful.model import Decoder
from handful.observe import Recording
from handful.routing_options import Missing
from handful.sampling import Logprobs
from handful.server.requests import Asked
from handful.server.routed import experts_npy, weights_npy
from handful.server.schema import DrawnBody
from handful.text import Tokenizer

__all__ = ["Answer", "ChatAnswer", "CompletionAnswer", "Piece", "Tells", "degraded"]


class Entry(NamedTuple):
    """A token of an answer, where its text begins in it, and its log-probabilities; None for a prompt's first."""

    token: int
    offset: int
    seen: Logprobs | None


@dataclass
class Piece:
    """Some of an answer's text, the tokens behind it, and why it ended, if it did."""

    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    finish: Finish | None = None
    prompt: Sequence[int] | None = None  # in the first, where tokens are to be told
    tokens: list[int] = field(default_factory=list)
    routed: list[Recording] = field(default_factory=list)
    missing: Missing | None = None  # of several the one with most experts

    def __bool__(self) -> bool:
        """There is something to show."""
        return bool(self.text or self.entries or self.finish or self.tokens or self.routed)


class _Choice:
    """One choice while it is made."""

    def __init__(self, asked: Asked, tells: Tells) -> None:
        self.asked = asked
        self.made = 0
        self.cached = 0
        self.begun = False
        self._tells = tells
        self._length = 0  # of the text so far
        self._skip = tells.routed_from
        self._missing: Missing | None = None  # of what was not shown yet

    def take(self, delta: Delta, tokenizer: Tokenizer | None) -> Piece:
        request, piece = self.asked.request, Piece(finish=delta.finish)
        if not self.begun and self.asked.echo is not None:
            piece.text = self.asked.echo
            if request.logprobs is not None:
                offsets = _offsets(request.prompt, self.asked.echo, tokenizer)
                rows = zip(request.prompt, offsets, delta.job.prompt_logprobs, strict=False)  # fewer, if it failed
                piece.entries = [Entry(*row) for row in rows]
        if not self.begun:
            self.cached = delta.job.cached
            if self._tells.token_ids:
                piece.prompt = request.prompt
        self.begun = True
        self.made += delta.token is not None
        if self._tells.token_ids and delta.token is not None:
            piece.tokens = [delta.token]
        if delta.routed is not None:
            skip, self._skip = min(self._skip, delta.routed.tokens), 0
            piece.routed = [delta.routed.part(skip, delta.routed.tokens)]
        # Who scores an echoed prompt counts on an entry for every drawn token, one that ends it too.
        token = delta.stop_token if delta.token is None and self.asked.echo is not None else delta.token
        if token is not None and request.logprobs is not None:
            piece.entries.append(Entry(token, self._length + len(piece.text), delta.logprobs))
        piece.text += delta.text
        self._length += len(piece.text)
        self._missing = _most(self._missing, delta.missing)
        if piece:
            piece.missing, self._missing = self._missing, None
        return piece


def _most(one: Missing | None, other: Missing | None) -> Missing | None:
    if one is None or other is None:
        return one or other
    return one if one.count > other.count else other


def degraded(missing: Missing) -> dict[str, Any]:
    """What is told of experts that an answer was made without: of each layer which, how many of all, and what that
    costs in nats per token of a text that was held out; null where it is not known yet."""
    loss = missing.loss
    return {
        "layers": {str(layer): list(experts) for layer, experts in missing.experts.items()},
        "experts": missing.count,
        "of": missing.of,
        "loss": None
        if loss is None
        else {
            "without": round(loss.without, 6),
            "whole": round(loss.whole, 6),
            "more": round(loss.without - loss.whole, 6),
            "tokens": loss.tokens,
        },
    }


def _offsets(prompt: Sequence[int], echo: str, tokenizer: Tokenizer | None) -> list[int]:
    """Where each token of a prompt begins in its text, in which what a tokenizer puts before it is not shown."""
    if tokenizer is None:
        return [0] * len(prompt)
    pieces = tokenizer.pieces(prompt)
    before = max(0, len("".join(pieces)) - len(echo))
    offsets, at = [], -before
    for piece in pieces:
        offsets.append(min(max(0, at), len(echo)))
        at += len(piece)
    return offsets


@dataclass(frozen=True, kw_only=True)
class Tells:
    """What an answer tells beside its text.

    as_ids       tokens are shown as "token_id:7" in log-probabilities.
    token_ids    the tokens themselves.
    weights      of the chosen experts, beside them.
    routed_from  the first token of the prompt whose routing is told, where it is recorded.
    """

    as_ids: bool = False
    token_ids: bool = False
    weights: bool = False
    routed_from: int = 0

    @staticmethod
    def of(body: DrawnBody) -> Tells:
        return Tells(
            as_ids=bool(body.return_tokens_as_token_ids),
            token_ids=bool(body.return_token_ids),
            weights=bool(body.routed_weights),
            routed_from=body.routed_experts_prompt_start or 0,
        )


class Answer:
    """An answer to a request with one or more choices.

    usage   tokens of its prompts (of each once, however many choices it has) and those that were made.
    """

    kind, whole, chunk = "", "", ""

    def __init__(self, name: str, model: Decoder, asked: Sequence[Asked], n: int, tells: Tells) -> None:
        """name: the model's, to clients. n: choices of each prompt."""
        self.head = {"id": f"{self.kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        self.choices = [_Choice(one, tells) for one in asked]
        self.n = n
        self.prompt_tokens = sum(len(one.request.prompt) for one in asked[::n])
        self.tokenizer = model.tokenizer
        self.router = model.config.router
        self.tells = tells

    def take(self, index: int, delta: Delta) -> Piece:
        return self.choices[index].take(delta, self.tokenizer)

    def usage(self) -> dict[str, Any]:
        made = sum(choice.made for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached for choice in self.choices[:: self.n])},
        }

    def of_pieces(self, pieces: Sequence[Iterable[Piece]]) -> dict[str, Any]:
        """The whole answer, of each choice's pieces."""
        whole = [_joined(found) for found in pieces]
        choices = [self.choice(index, piece, whole=True) for index, piece in enumerate(whole)]
        head = {**self.head, "object": self.whole, "choices": choices}
        missing = functools.reduce(_most, (piece.missing for piece in whole))
        return {**head, **self.once(whole[0]), **_lack(missing), "usage": self.usage()}

    def chunks(self, index: int, piece: Piece, first: bool) -> list[dict[str, Any]]:
        """What a stream tells of a piece; first: nothing was told of this choice yet."""
        if not piece:
            return []
        return [self.chunk_of([self.choice(index, piece, whole=False)]) | self.once(piece) | _lack(piece.missing)]

    def once(self, piece: Piece) -> dict[str, Any]:
        """What is told beside the choices, of the first piece of one."""
        return {}

    def chunk_of(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": self.chunk, "choices": choices}

    def choice(self, index: int, piece: Piece, *, whole: bool) -> dict[str, Any]:
        raise NotImplementedError

    def text(self, token: int) -> str:
        """How a token is shown; a part of a character as U+FFFD."""
        if self.tells.as_ids or self.tokenizer is None:
            return f"token_id:{token}"
        return self.tokenizer.token_bytes(token).decode("utf-8", "replace")

    def scored(self, index: int) -> bool:
        return self.choices[index].asked.request.logprobs is not None

    def beside(self, piece: Piece) -> dict[str, Any]:
        """What was asked to be told beside a choice's text."""
        found: dict[str, Any] = {"token_ids": piece.tokens} if self.tells.token_ids else {}
        if piece.routed and self.router is not None:
            routed = Recording.joined(piece.routed)
            found["routed_experts"] = experts_npy(routed, self.router)
            if self.tells.weights:
                found["routed_weights"] = weights_npy(routed)
        return found


def _lack(missing: Missing | None) -> dict[str, Any]:
    return {} if missing is None else {"degraded": degraded(missing)}


def _joined(pieces: Iterable[Piece]) -> Piece:
    whole = Piece()
    for piece in pieces:
        whole.text += piece.text
        whole.entries += piece.entries
        whole.finish = piece.finish
        whole.prompt = piece.prompt if whole.prompt is None else whole.prompt
        whole.tokens += piece.tokens
        whole.routed += piece.routed
        whole.missing = _most(whole.missing, piece.missing)
    return whole


class CompletionAnswer(Answer):
    kind, whole, chunk = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, piece: Piece, *, whole: bool) -> dict[str, Any]:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": self._columns(piece.entries) if self.scored(index) else None,
            "finish_reason": piece.finish,
            **({} if piece.prompt is None else {"prompt_token_ids": piece.prompt}),
            **self.beside(piece),
        }

    def _columns(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {
            "tokens": [self.text(entry.token) for entry in entries],
            "token_logprobs": [None if entry.seen is None else entry.seen.token for entry in entries],
            "top_logprobs": [None if entry.seen is None else self._top(entry.token, entry.seen) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _top(self, token: int, seen: Logprobs) -> dict[str, float]:
        """By text, the most probable of one text; the token itself too, if it is none of them."""
        found: dict[str, float] = {}
        for other, value in (*seen.top.items(), (token, seen.token)):
            found.setdefault(self.text(other), value)
        return found


class ChatAnswer(Answer):
    kind, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def once(self, piece: Piece) -> dict[str, Any]:
        return {} if piece.prompt is None else {"prompt_token_ids": piece.prompt}

    def choice(self, index: int, piece: Piece, *, whole: bool) -> dict[str, Any]:
        said: dict[str, Any]
        if whole:
            said = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
        else:
            said = {"delta": {"content": piece.text} if piece.text or piece.entries else {}}
        seen = {"content": [self._row(entry) for entry in piece.entries], "refusal": None}
        return {
            "index": index,
            **said,
            "logprobs": seen if self.scored(index) and (whole or piece.entries) else None,
            "finish_reason": piece.finish,
            **self.beside(piece),
        }

    def chunks(self, index: int, piece: Piece, first: bool) -> list[dict[str, Any]]:
        role = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return ([self.chunk_of([role])] if first else []) + super().chunks(index, piece, first)

    def _row(self, entry: Entry) -> dict[str, Any]:
        assert entry.seen is not None
        top = [self._one(token, value) for token, value in entry.seen.top.items()]
        return {**self._one(entry.token, entry.seen.token), "top_logprobs": top}

    def _one(self, token: int, value: float) -> dict[str, Any]:
        own = None if self.tokenizer is None else list(self.tokenizer.token_bytes(token))
        return {"token": self.text(token), "logprob": value, "bytes": own}
