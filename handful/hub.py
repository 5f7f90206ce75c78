"""`org/name` and `org/name@revision`: a model on the Hugging Face Hub, and the files of it that are wanted."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from handful.errors import CheckpointError, first_line

__all__ = ["TOKENIZER_FILES", "WEIGHTS", "fetch", "repository"]

# A tokenizer's files, whatever its kind, and the chat templates beside it.
TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "additional_chat_templates/*.jinja")
# Not the same weights again in another form, which some keep in folders or as consolidated.safetensors.
WEIGHTS = ("model*.safetensors",)

# A pattern's * takes folders too: those without a name of ours are left.
_ELSEWHERE = ["[!a]*/*", "a[!d]*/*"]
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


def repository(name: str) -> tuple[str, str | None] | None:
    """(org/name, revision) that a name means; None for one that can only be a path. A revision is a branch, a tag or
    a commit."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2]) if found else None


def fetch(name: str, wanted: Sequence[str]) -> Path:
    """The folder that holds a repository's files of these patterns, downloaded if huggingface_hub's cache lacks them.

    A name may be a path with a slip in it, so that it is looked for elsewhere is said on stderr first. CheckpointError
    for a name that no repository can have, and for what cannot be had.
    """
    found = repository(name)
    if found is None:
        raise CheckpointError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    where = "in the Hugging Face Hub's cache (HF_HUB_OFFLINE)" if HF_HUB_OFFLINE else "on the Hugging Face Hub"
    print(f"{name}: no such folder here; looking for it {where}", file=sys.stderr, flush=True)
    try:
        repo, revision = found
        folder = snapshot_download(repo, revision=revision, allow_patterns=list(wanted), ignore_patterns=_ELSEWHERE)
        return Path(folder)
    except Exception as error:  # of many kinds: no network, no such name, no access, …
        raise CheckpointError(f"{name}: no such folder, and it cannot be downloaded: {first_line(error)}") from None
