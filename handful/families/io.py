"""Load and save a decoder as a Hugging Face checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from handful import checkpoint
from handful.config import ModelConfig
from handful.errors import CheckpointError
from handful.families import config_from_hf, config_to_hf, tensors_from_hf, tensors_to_hf
from handful.model import Decoder
from handful.text import Tokenizer, load_tokenizer

__all__ = ["checkpoint_files", "find_config", "find_folder", "load", "read_into", "save"]


def find_folder(path_or_repo: str | Path, only: str | None = None) -> Path:
    """The checkpoint folder of a run folder, a checkpoint folder or `org/name`, which is downloaded if it is not local
    (or `only` one file of it).

    CheckpointError if it is none of these.
    """
    path = Path(path_or_repo)
    for folder in (path / "model", path):
        if (folder / "config.json").exists():
            return folder
    if path.exists():
        raise CheckpointError(f"{path}: holds no checkpoint (config.json), nor a run that has reached one")
    name = str(path_or_repo)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=only or ["*.json", "*.safetensors"]))
    except Exception as error:  # of many kinds: no network, no such name, no access, …
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{name}: no such folder, and it cannot be downloaded: {reason}") from None


def find_config(model: str | Path) -> ModelConfig:
    """The config of a `config.json`, a run or checkpoint folder, or `org/name`, of which only that file is fetched.

    It is for `cost`: the family may be one that can be counted but not run.
    """
    path = Path(model)
    file = path if path.is_file() else find_folder(model, only="config.json") / "config.json"
    return config_from_hf(checkpoint.read_json(file), count_only=True)


def load(
    path_or_repo: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu", backend: str = "auto"
) -> Decoder:
    """A decoder from a run folder, a Hugging Face checkpoint folder or `org/name`, in evaluation mode.

    dtype     of the weights; None keeps the checkpoint's.
    backend   who multiplies the experts (see `handful.experts`).

    The checkpoint's tokenizer, if it has one, is `model.tokenizer`. CheckpointError, with nothing half-loaded, for a
    family that is not there or tensors that are missing, too many or of a wrong shape.
    """
    folder = find_folder(path_or_repo)
    config = config_from_hf(checkpoint.read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Decoder(config, backend=backend)
    model.load_state_dict(tensors_from_hf(config, checkpoint.read_tensors(folder)), strict=True, assign=True)
    if (folder / "tokenizer.json").exists():
        model.tokenizer = load_tokenizer(folder)
    # The module does the conversion: its routers keep their balance bias in float32.
    return model.to(device=device, dtype=dtype).eval()


def save(model: Decoder, path: str | Path) -> None:
    """Write a decoder as a Hugging Face checkpoint folder, which appears whole or not at all."""
    checkpoint.write_folder(path, checkpoint_files(model, model.tokenizer))


def checkpoint_files(model: Decoder, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """File name -> content of the checkpoint folder of a decoder."""
    config = {**config_to_hf(model.config), "torch_dtype": str(model.embed.weight.dtype).removeprefix("torch.")}
    if tokenizer is not None:
        config |= {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    tensors = tensors_to_hf(model.config, {name: t.detach() for name, t in model.state_dict().items()})
    return {"config.json": config, "model.safetensors": tensors, **(tokenizer.files() if tokenizer else {})}


def read_into(model: Decoder, folder: Path) -> None:
    """Read a checkpoint folder's weights into a decoder of the same shape."""
    model.load_state_dict(tensors_from_hf(model.config, checkpoint.read_tensors(folder)), strict=True)
