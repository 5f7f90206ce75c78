"""Public families and ours: one table per family reads and writes its config.json and its tensors.

load(source) -> Decoder            from a run folder, a checkpoint folder or org/name
save(model, folder)                a checkpoint that transformers loads too, if a public family has the same maths
config_from_hf, config_to_hf       config.json <-> ModelConfig
tensors_from_hf, tensors_to_hf     a checkpoint's tensors <-> the decoder's state_dict
why_not_public                     what keeps a config from being written as a public family
"""

from __future__ import annotations

from handful.families.convert import config_from_hf, config_to_hf, tensors_from_hf, tensors_to_hf, why_not_public
from handful.families.io import load, save

__all__ = ["config_from_hf", "config_to_hf", "load", "save", "tensors_from_hf", "tensors_to_hf", "why_not_public"]
