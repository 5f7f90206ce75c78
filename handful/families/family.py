"""A public family: its rows read and write its config.json, its names its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from handful.config import ModelConfig
from handful.config_io import from_dict
from handful.errors import CheckpointError, ConfigError
from handful.families.config_fields import TableRow, Values, refusal
from handful.families.plugin_types import plugin_hint
from handful.families.weights import Names

__all__ = ["NO_MATHS", "Family", "check_known", "has_dense", "is_harmless", "read_rows"]

# Fields that change no logits: names, token ids, how weights began, what training and generation do.
NO_MATHS = frozenset(
    {
        "architectures",
        "attention_dropout",
        "auto_map",
        "aux_loss_alpha",
        "bos_token_id",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "ep_size",
        "gradient_checkpointing",
        "handful",
        "hidden_dropout",
        "initial_context_length",
        "initializer_range",
        "is_llama_config",
        "model_type",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "resid_pdrop",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "seq_aux",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    }
)
# What transformers 4 let every config have: tasks' labels, what a call returns, and how text is generated, which moved
# to generation_config.json. Those that could change a decoder's logits (is_decoder, tie_…) are not among them.
EVERY_CONFIG = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "label2id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "prefix",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torchscript",
        "typical_p",
        "use_bfloat16",
    }
)


def is_harmless(key: str) -> bool:
    """A field changes no logits, whatever it says. Transformers' own notes begin with _, a tool's with its name."""
    return key in NO_MATHS or key in EVERY_CONFIG or key.startswith(("_", "unsloth_"))


@dataclass(frozen=True)
class Family:
    """A public family.

    model_type, architecture   what its config.json calls it, and the class that transformers loads it into.
    also                       other names of the same maths, read but not written.
    rows                       its config.
    names                      its tensors (`weights.py`). The first table is written; the others are read too.
    dense                      it has no router.
    later_tokens               a layer past the last, which predicts a later token, may stand in it and is not read.
    lacks                      what it has and our decoder cannot run; "": it can run all.
    """

    model_type: str
    architecture: str
    rows: tuple[TableRow, ...]
    names: tuple[Names, ...] = ()
    also: tuple[str, ...] = ()
    dense: bool = False
    later_tokens: bool = False
    lacks: str = ""

    def read(self, values: Values, *, count_only: bool = False) -> ModelConfig:
        """A config.json's values as our config. CheckpointError names a field that is missing, malformed or, unless
        only counting, one whose maths our decoder does not have."""
        if self.lacks and not count_only:
            lacks = f"it has {self.lacks}{plugin_hint(self.model_type)}"
            raise refusal("model_type", self.model_type, f"can be counted but not run: {lacks}")
        nested = read_rows(self.rows, values, count_only=count_only)
        if not count_only:
            check_known(self.model_type, self.rows, values, NO_MATHS)
        try:
            config = from_dict(ModelConfig, nested)
        except ConfigError as error:
            raise CheckpointError(f"config.json of {self.model_type}: {error}") from None
        # Some give dense layers a width where there are none.
        return config if has_dense(config) else dataclasses.replace(config, ffn=0)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Our config as a config.json's values, as far as they can say it."""
        out: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for row in self.rows:
            out |= row.write(config)
        return out


def read_rows(rows: Sequence[TableRow], values: Values, *, count_only: bool = False) -> dict[str, Any]:
    """What rows read of a config.json, nested as our configs are. CheckpointError as in `Family.read`."""
    nested: dict[str, Any] = {}
    for row in rows:
        try:
            if not count_only:
                row.check(values)
            settings = row.read(values)
        except (ArithmeticError, AttributeError, TypeError, ValueError):
            given = ", ".join(f"{key} = {values[key]!r}" for key in row.keys if key in values)
            raise CheckpointError(f"config.json: {given}: malformed") from None
        for path, value in settings.items():
            *outer, name = path.split(".")
            (nested.setdefault(outer[0], {}) if outer else nested)[name] = value
    return nested


def check_known(model_type: str, rows: Sequence[TableRow], values: Values, harmless: frozenset[str]) -> None:
    """CheckpointError for a field that says something, that no row knows and that may change logits."""
    known = harmless.union(*(row.keys for row in rows))
    for key, value in values.items():
        if value and key not in known and not is_harmless(key):
            raise refusal(key, value, f"not known for {model_type}; remove it if it changes no logits")


def has_dense(config: ModelConfig) -> bool:
    """Some layer has a dense feed-forward network."""
    return not all(config.is_moe(layer) for layer in range(config.layers))
