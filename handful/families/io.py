"""Load and save a decoder as a Hugging Face checkpoint folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handful import checkpoint
from handful.config import MOST_LAYERS, EncoderDecoderConfig, ModelConfig
from handful.cost import Precision
from handful.count import Counted
from handful.encoder_decoder import EncoderDecoder
from handful.errors import CheckpointError, ConfigError
from handful.experts.quantized import PackedWeight
from handful.families import switch_transformers
from handful.families.convert import carried, config_from_hf, config_to_hf, tensors_from_hf, tensors_to_hf
from handful.families.materialize import Progress, materialize
from handful.families.precision import precision_from_hf
from handful.families.pricing import count_from_hf
from handful.hub import TOKENIZER_FILES, WEIGHTS, fetch
from handful.lazy_tensors import Tensors
from handful.meta_device import meta_device
from handful.model import Decoder
from handful.origin import read_origin
from handful.quantize import check_format
from handful.text import Tokenizer, load_tokenizer
from handful.tokenizer_files import has_tokenizer

__all__ = [
    "checkpoint_files",
    "find_config",
    "find_folder",
    "find_tokenizer",
    "load",
    "load_decoder",
    "open_checkpoint",
    "read_state",
    "save",
]


LISTED = 6  # runs that a message names at most


def find_folder(path_or_repo: str | Path, only: str | None = None) -> Path:
    """The checkpoint folder of a run folder, a checkpoint folder, `org/name` or `org/name@revision`, which is
    downloaded if it is not local (or `only` one file of it). What huggingface_hub's cache holds is not fetched again,
    and offline it is all there is.

    CheckpointError if it is none of these.
    """
    path = Path(path_or_repo)
    for folder in (path / "model", path):
        if (folder / "config.json").exists():
            return folder
    for pattern, what in (("*/seed-*/run.json", "a comparison"), ("*/run.json", "runs")):
        runs = [str(run.parent) for run in sorted(path.glob(pattern))]
        if runs:
            more = ", …" if len(runs) > LISTED else ""
            raise CheckpointError(f"{path}: holds {what}; name one of its runs: {', '.join(runs[:LISTED])}{more}")
    if path.exists():
        raise CheckpointError(f"{path}: holds no checkpoint (config.json), nor a run that has reached one")
    wanted = (only,) if only else (*TOKENIZER_FILES, *WEIGHTS)
    return fetch(str(path_or_repo), wanted)


def find_config(model: str | Path) -> ModelConfig | EncoderDecoderConfig | Counted:
    """The config of a `config.json`, a run or checkpoint folder, or `org/name`, of which only that file is fetched.

    It is for `cost`: a model that can be counted but not run is given as what it is made of.
    """
    path = Path(model)
    file = path if path.is_file() else find_folder(model, only="config.json") / "config.json"
    return count_from_hf(_read_config(file))


def find_precision(model: str | Path) -> Precision | None:
    """How the checkpoint that `find_config` reads of stores its weights; None where its config.json does not say."""
    path = Path(model)
    file = path if path.is_file() else find_folder(model, only="config.json") / "config.json"
    return precision_from_hf(_read_config(file))


def find_tokenizer(folder: Path, model: Decoder | EncoderDecoder) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder; None if it has none. DataError for one that the model cannot use.

    Only training on text needs one that can write any. T5's cannot, and an encoder-decoder takes it.
    """
    if not has_tokenizer(folder):
        return None
    return load_tokenizer(folder, any_text=isinstance(model, Decoder))


def load(
    path_or_repo: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    backend: str = "auto",
    quantize: int | None = None,
    group: int = 32,
    progress: Progress | None = None,
) -> Decoder | EncoderDecoder:
    """A decoder (or the encoder-decoder that it is) from a run folder, a Hugging Face checkpoint folder or `org/name`,
    in evaluation mode.

    dtype     of the weights; None keeps the checkpoint's.
    backend   who multiplies the experts (see `handful.experts`).
    quantize  4 or 8: hold the weights in as many bits, in groups of `group`, as `quantize_model` does, and pack them
              while they are read: memory for the model in its own dtype is never needed.
    progress  is told (bytes done, bytes in all) after every tensor.

    The checkpoint's tokenizer, if it has one, is `model.tokenizer`; what else it says, `model.origin`. Memory beyond
    the model is one of its tensors.
    CheckpointError, with nothing half-loaded, for a family that is not there or tensors that are missing, too many or
    of a wrong shape or dtype: all are checked before any is read. ConfigError for a wrong setting.
    """
    if quantize is not None:
        check_format(quantize, group)
    model, state, folder = open_checkpoint(path_or_repo, backend)
    tokenizer = find_tokenizer(folder, model)
    materialize(model, state, dtype=dtype, device=device, quantize=quantize, group=group, progress=progress)
    model.tokenizer = tokenizer
    return model.eval()


def open_checkpoint(path_or_repo: str | Path, backend: str = "auto") -> tuple[Decoder | EncoderDecoder, Tensors, Path]:
    """A model without memory, its checkpoint's tensors under our names, checked and not read yet, and its folder.

    CheckpointError as in `load`.
    """
    folder = find_folder(path_or_repo)
    values = _read_config(folder / "config.json")
    model: Decoder | EncoderDecoder
    state: Mapping[str, Tensor]
    if switch_transformers.is_encoder_decoder(values):
        shape = switch_transformers.config_from_hf(values)
        state = switch_transformers.tensors_from_hf(shape, checkpoint.read_tensors(folder))
        with meta_device():
            model = EncoderDecoder(shape, backend=backend)
    else:
        config = config_from_hf(values)
        tensors = checkpoint.read_tensors(folder)
        if config.tied and _has_head_of_its_own(tensors):
            config = dataclasses.replace(config, tied=False)
        if config.layers > len(tensors):
            raise CheckpointError(f"config.json: {config.layers} layers: the checkpoint has {len(tensors)} tensors")
        state = tensors_from_hf(config, tensors)
        with meta_device():
            model = Decoder(config, backend=backend)
    model.origin = read_origin(folder, values)
    return model, Tensors.of(state), folder


def _has_head_of_its_own(tensors: Tensors) -> bool:
    """The tensors hold an output embedding that is not the input's, whatever config.json says of it: as transformers,
    which ties two tensors only where they are equal."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if not all(name in tensors for name in names):
        return False
    embed, head = (tensors.entry(name) for name in names)
    return (embed.shape, embed.dtype) != (head.shape, head.dtype) or not torch.equal(embed.read(), head.read())


def load_decoder(path_or_repo: str | Path, **options: Any) -> Decoder:
    """`load` where only a decoder will do. ConfigError for a model of another kind."""
    found = load(path_or_repo, **options)
    if not isinstance(found, Decoder):
        raise ConfigError(f"{path_or_repo}: is an encoder-decoder: a decoder is needed")
    return found


def _read_config(file: Path) -> dict[str, Any]:
    """A config.json's values. CheckpointError for numbers with which the rest would take hours or mean nothing."""
    values = checkpoint.read_json(file)
    left = [values]
    while left:
        table = left.pop()
        for key, value in table.items():
            if isinstance(value, int) and value > (MOST_LAYERS if key.endswith("layers") else 1 << 63):
                most = f"at most {MOST_LAYERS}" if key.endswith("layers") else "no size is as large"
                raise CheckpointError(f"{file}: {key} = {str(value)[:40]}: {most}")
            left += [value] if isinstance(value, dict) else []
    return values


def save(model: Decoder | EncoderDecoder, path: str | Path, *, max_shard_bytes: int = checkpoint.SHARD) -> None:
    """Write a model as a Hugging Face checkpoint folder, which appears whole or not at all.

    max_shard_bytes   of tensors in one file; a larger model is written in several, with an index.

    CheckpointError for a quantized model, or if the disk refuses; ConfigError for a limit below 1.
    """
    checkpoint.write_folder(path, checkpoint_files(model, model.tokenizer, max_shard_bytes))


def checkpoint_files(
    model: Decoder | EncoderDecoder,
    tokenizer: Tokenizer | None,
    max_shard_bytes: int = checkpoint.SHARD,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """File name -> content of the checkpoint folder of a model: tensors as views, or made when they are written.

    state   the model's tensors, where they are not all its own.

    What the model's own checkpoint said, and what its tokenizer was read from, is handed on unchanged.
    """
    if any(isinstance(module, PackedWeight) for module in model.modules()):
        raise CheckpointError("a quantized model cannot be saved: save it before, and load it with quantize = 4 or 8")
    if state is None:
        state = {name: t.detach() for name, t in model.state_dict().items()}
    tensors: Mapping[str, Tensor]
    if isinstance(model, EncoderDecoder):
        config = switch_transformers.config_to_hf(model.config)
        tensors = switch_transformers.tensors_to_hf(model.config, state)
    else:
        like = model.origin.config.get("model_type") if model.origin else None
        config, tensors = config_to_hf(model.config, like=like), tensors_to_hf(model.config, state, like=like)
        if tokenizer is not None:
            bos = tokenizer.prefix[0] if tokenizer.prefix else tokenizer.eos_id
            config |= {"bos_token_id": bos, "eos_token_id": tokenizer.eos_id}
    config |= {"torch_dtype": str(model.embed.weight.dtype).removeprefix("torch.")}
    if model.origin is not None:
        config = carried(config, model.config, model.origin.config)
    weights = checkpoint.shards(tensors, max_shard_bytes)
    beside = {**(tokenizer.files() if tokenizer else {}), **(model.origin.files if model.origin else {})}
    return {"config.json": config, **weights, **beside}


def read_state(config: ModelConfig, folder: Path) -> Tensors:
    """A checkpoint folder's tensors by our names, none of them read yet. CheckpointError as in `load`."""
    return Tensors.of(tensors_from_hf(config, checkpoint.read_tensors(folder)))
