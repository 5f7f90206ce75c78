"""Runs a subject over windows: the routing of every token, and the nats of every document.

Legend: B windows of one length · S tokens of one · T tokens · D documents
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from handful.errors import DataError
from handful.inspection.routings import Observed, halves
from handful.inspection.subject import Stage, Subject
from handful.inspection.texts import Document, Window

__all__ = ["batches", "more_nats", "observe", "stages", "token_names"]

TOKENS = 4096  # that go through the model together
FEWEST = 4  # documents

Progress = Callable[[int, int], None]


def batches(windows: Sequence[Window]) -> Iterator[tuple[list[int], Tensor]]:
    """Windows of one length together, so that none needs padding: their places, and (B, S + 1) tokens. The longest
    first, and those of one length in their order."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for place, window in enumerate(windows):
        groups[window.length].append(place)
    for length in sorted(groups, reverse=True):
        step = max(1, TOKENS // length)
        for at in range(0, len(groups[length]), step):
            places = groups[length][at : at + step]
            yield places, torch.tensor([windows[place].tokens for place in places])


def observe(
    subject: Subject,
    documents: Sequence[Document],
    windows: Sequence[Window],
    kinds: Sequence[str],
    progress: Progress | None = None,
) -> tuple[Observed, float, bool]:
    """The routings of all windows, the mean nats per token, and whether all were read: a Ctrl-C ends it with what it
    has, if that is of four documents at least."""
    got: dict[int, list[Tensor]] = {}  # of each window its layers' (S, K)
    nats, count, whole = 0.0, 0, True
    total = sum(window.length for window in windows)
    try:
        for places, tokens_BS in batches(windows):
            nats_BS, experts = subject.run(tokens_BS[:, :-1], tokens_BS[:, 1:])
            split = [experts_TK.view(len(places), -1, experts_TK.shape[1]) for experts_TK in experts]
            for row, place in enumerate(places):
                got[place] = [layer[row] for layer in split]
            nats += float(nats_BS.double().sum())
            count += nats_BS.numel()
            if progress is not None:
                progress(count, total)
    except KeyboardInterrupt:
        if len({windows[place].document for place in got}) < FEWEST:
            raise
        whole = False
    places = sorted(got)
    read = sorted({windows[place].document for place in places})
    if len(read) < FEWEST:
        raise DataError(f"text: {len(read)} documents in so few tokens, where {FEWEST} at least are needed")
    number = {document: i for i, document in enumerate(read)}
    lengths = [0] * len(read)
    for place in places:
        lengths[number[windows[place].document]] += windows[place].length
    labels = {kind: [documents[document].labels[kind] for document in read] for kind in kinds}
    sizes = torch.tensor([windows[place].length for place in places])
    observed = Observed(
        subject.layers,
        subject.experts,
        [torch.cat([got[place][layer] for place in places]) for layer in range(len(subject.layers))],
        torch.tensor([token for place in places for token in windows[place].tokens[:-1]]),
        torch.tensor([number[windows[place].document] for place in places]).repeat_interleave(sizes),
        torch.arange(len(places)).repeat_interleave(sizes),
        torch.cat([torch.arange(size) for size in sizes.tolist()]),
        halves(lengths, labels),
        labels,
    )
    return observed, nats / max(1, count), whole


def stages(subject: Subject, windows: Sequence[Window], layer: int) -> list[tuple[list[int], Stage]]:
    """All windows up to the experts of a layer, batch by batch: the document of each, and the batch."""
    return [
        ([windows[place].document for place in places], subject.before(tokens_BS[:, :-1], tokens_BS[:, 1:], layer))
        for places, tokens_BS in batches(windows)
    ]


def more_nats(
    subject: Subject, staged: Sequence[tuple[Sequence[int], Stage]], documents: int, experts: Sequence[int]
) -> Tensor:
    """(D,) the nats of each document's windows with these experts off, less those with all on."""
    more_D = torch.zeros(documents, dtype=torch.float64)
    for at, stage in staged:
        more_D.index_add_(0, torch.tensor(at), subject.without(stage, experts).double().sum(1))
    return more_D


def token_names(subject: Subject, ids: Sequence[object]) -> Mapping[int, str]:
    """What each token stands for, to be shown: its text, or its bytes where they are none."""
    found = {}
    for token in ids:
        assert isinstance(token, int)
        raw = subject.tokenizer.token_bytes(token)
        try:
            found[token] = raw.decode()
        except UnicodeDecodeError:
            found[token] = "".join(f"<{byte:02x}>" for byte in raw)
    return found
