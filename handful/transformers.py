"""The plug-in: our experts, and our view of the router, in the mixtures of experts that transformers has.

    import handful.transformers

    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="handful")
    handful.transformers.check(model)  # {"model.layers.0.mlp.experts": "swiglu", ...}, or why it cannot be
    with handful.transformers.watch(model) as seen:
        model.generate(...)
    handful.observe.expert_load(seen.routings()["model.layers.0.mlp.experts"])

transformers holds the experts of a layer in one module, marked by its decorator `use_experts_implementation`, which is
given (x_TD, experts_TK, weights_TK) and may be computed by others. Here a backend of `handful.experts` does so, on the
module's own weights and without a copy of them. What stands between the two products is decided by trying the
module's own gate on numbers: where it is an activation of ours the whole is a backend's, and else the module's own
gate runs between our products. So do the modules that store their matrices turned, which the backends do not read.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width · G = 2·F gate and up
rows (F without a gate) · R rows of the grouped layout
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from handful.errors import CheckpointError, ConfigError, MissingExtraError, first_line
from handful.experts import BACKENDS, activate
from handful.experts.grouped import Own, grouped
from handful.experts.no_compile import no_compile
from handful.experts.weights import ExpertWeights, check_fits
from handful.router_watch import Watch
from handful.routing import Routing

__all__ = ["NAME", "Watch", "check", "experts_forward", "load_causal", "watch"]

NAME = "handful"  # experts_implementation="handful"
OLDEST = (5, 23)
OWN_GATE = "own gate"  # in check(): no activation of ours, so the module's gate runs between our products

# What the decorator says of a module. A flag that a later transformers adds is not here: see `_flags`.
FLAGS = ("is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _import(name: str) -> Any:
    """A module of transformers; MissingExtraError where there is none, or one from before the decorator's flags."""
    oldest = ".".join(map(str, OLDEST))
    missing = MissingExtraError(f"transformers>={oldest}", "handful.transformers", "transformers")
    try:
        version = re.match(r"(\d+)\.(\d+)", importlib.import_module("transformers").__version__)
        if version is None or (int(version[1]), int(version[2])) < OLDEST:
            raise missing
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise missing from None


_moe = _import("transformers.integrations.moe")
_PreTrainedModel: Any = _import("transformers.modeling_utils").PreTrainedModel

_defaults = {
    name: parameter.default
    for name, parameter in inspect.signature(_moe.use_experts_implementation).parameters.items()
    if name not in ("experts_class", "experts_interface")
}


# ---------------------------------------------------------------------------------------------------------------------
# A module of theirs, read as experts of ours.


def borrow(module: Any) -> ExpertWeights:
    """An experts module of transformers as our backends take experts, with its own weights; of one that stores its
    matrices turned, views. Its activation is OWN_GATE where no backend computes it. ConfigError for weights or a flag
    that we do not know."""
    kind = type(module).__name__
    for flag, default in _defaults.items():
        if flag not in FLAGS and getattr(module, flag, default) != default:
            raise ConfigError(f"{kind}.{flag} = {getattr(module, flag)}: handful does not know this flag of experts")
    first = "gate_up_proj" if module.has_gate else "up_proj"
    names = [first, "down_proj"] + ([f"{first}_bias", "down_proj_bias"] if module.has_bias else [])
    weights = []
    for name in names:
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
            what = "missing" if weight is None else getattr(weight, "dtype", type(weight).__name__)
            raise ConfigError(f"{kind}.{name} is {what}: handful takes float64, float32, bfloat16 and float16 tensors")
        weights.append(weight)
    gate_up, down = (weight.mT if module.is_transposed else weight for weight in weights[:2])
    E, D, hidden = down.shape if down.dim() == 3 else (0, 0, 0)
    if gate_up.shape != (E, hidden * (2 if module.has_gate else 1), D):
        raise ConfigError(
            f"{kind}.{first} has shape {tuple(weights[0].shape)} beside down_proj's {tuple(weights[1].shape)}: "
            f"no experts with has_gate = {module.has_gate}, is_transposed = {module.is_transposed}"
        )
    gate_up_bias, down_bias = weights[2:] if module.has_bias else (None, None)
    activation = OWN_GATE if module.is_transposed else _activation(module) or OWN_GATE
    return ExpertWeights(gate_up, None, down, None, gate_up_bias, down_bias, activation, hidden)


def between(module: Any) -> Callable[[Tensor], Tensor]:
    """What the module applies between its two products: (n, G) -> (n, F)."""
    return module._apply_gate if module.has_gate else module.act_fn  # type: ignore[no-any-return]


# The activation of each module and the settings that it was found for.
_found: WeakKeyDictionary[nn.Module, tuple[object, str | None]] = WeakKeyDictionary()


def _activation(module: Any) -> str | None:
    """Ours that computes what the module computes between its products, but for rounding; None if none does."""
    act = getattr(module, "act_fn", None)
    parts = act.modules() if isinstance(act, nn.Module) else ()
    settings = (act, *map(_scalars, (module, *parts)))
    if module not in _found or _found[module][0] != settings:
        _found[module] = (settings, _find_activation(module, act))
    return _found[module][1]


def _scalars(value: object) -> tuple[object, ...]:
    fields = getattr(value, "__dict__", {}).items()
    return tuple(v for name, v in fields if isinstance(v, int | float | str) and name != "training")


@torch.no_grad()
def _find_activation(module: Any, act: object) -> str | None:
    if module.has_post_expert_norm or (isinstance(act, nn.Module) and any(True for _ in act.parameters())):
        return None
    # From where every function of this kind is nearly linear to where every clamp that means anything has closed.
    sizes = [0.01, 0.3, 1, 2, 3, 5, 6.9, 7.1, 8, 10.1, 15, 20, 30, 50, 101, 1e3, 1e6]
    gate_F = torch.tensor([0.0, *sizes, *(-size for size in sizes)], dtype=torch.float64, device="cpu")
    up_nF = gate_F.unsqueeze(1).expand(-1, len(gate_F))
    gate_nF = gate_F.expand_as(up_nF)
    h_nG = torch.cat([gate_nF, up_nF], -1) if module.has_gate else gate_nF
    theirs_nF = between(module)(h_nG.clone())
    for kind in ("swiglu", "geglu", "swiglu_clamped") if module.has_gate else ("relu", "gelu"):
        # So near that only a cast to float32 inside of it can tell them apart.
        if torch.allclose(theirs_nF, activate(h_nG, kind), rtol=1e-6, atol=1e-9):
            return kind
    return None


# ---------------------------------------------------------------------------------------------------------------------
# experts_implementation="handful".


# What a step does depends on the load and on the module: no graph could hold it.
@no_compile
def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls for an experts module: (T, D), (T, K), (T, K) -> (T, D) in hidden_states' dtype.

    Forward and backward, gradients of everything that has one. Under transformers' expert parallelism the ids that
    belong to other ranks are left out. ConfigError for a module that we cannot read, RoutingError for ids that it has
    no experts for.
    """
    experts = borrow(module)
    routing = _routing(module, experts.experts, top_k_index, top_k_weights)
    check_fits(hidden_states, routing, experts.experts, experts.width)
    if experts.activation == OWN_GATE:
        norm = module.post_expert_norm if module.has_post_expert_norm else None
        y_TD = grouped(hidden_states, routing, experts, Own(between(module), norm, module.is_transposed))
    else:
        y_TD = BACKENDS["auto"](hidden_states, routing, experts)
    return y_TD.to(hidden_states.dtype)


def _routing(module: Any, count: int, experts_TK: Tensor, weights_TK: Tensor) -> Routing:
    dropped_TK = None
    if module._is_expert_parallel:
        # transformers gives what other ranks compute an id beyond this rank's experts.
        dropped_TK = experts_TK >= count
        experts_TK = experts_TK.clamp(max=count - 1)
    unused_TE = weights_TK.new_zeros(()).expand(len(experts_TK), count)  # no backend reads more of it than its shape
    return Routing(unused_TE, unused_TE, experts_TK.long(), weights_TK, dropped_TK)


def experts_of(model: nn.Module) -> dict[str, Any]:
    """The experts modules of a model that others may compute, by name. ConfigError if it has none."""
    found = {name: module for name, module in model.named_modules() if all(hasattr(module, flag) for flag in FLAGS)}
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no experts that can be reached: no module of it is decorated with "
            "transformers' use_experts_implementation"
        )
    return found


def check(model: nn.Module) -> dict[str, str]:
    """What experts_implementation="handful" computes each experts module of a model with, by the module's name.

    "swiglu", "geglu", "swiglu_clamped", "relu", "gelu": a backend of `handful.experts` does all of it. "own gate": the
    module's own gate, activation or norm runs between our products, in torch; so too where matrices are stored turned.

    ConfigError, in one line, for a model without such modules (transformers would ignore the setting there) and for
    weights that we cannot compute with.
    """
    return {name: borrow(module).activation for name, module in experts_of(model).items()}


def load_causal(folder: Path, implementation: str = NAME) -> Any:
    """A causal language model of a checkpoint folder, in evaluation mode and its own dtype, whose experts are computed
    by that implementation. Runs no code of the checkpoint. CheckpointError, in one line, where transformers cannot."""
    auto: Any = _import("transformers").AutoModelForCausalLM
    try:
        return auto.from_pretrained(str(folder), experts_implementation=implementation, dtype="auto").eval()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {first_line(error)}") from None


def watch(model: nn.Module, *, tokens: int = 16384) -> Watch:
    """Record the routing of every experts module of a transformers model, whatever computes its experts.

        with watch(model) as seen:
            model.generate(...)

    Changes no output bit. The hooks go when the block ends, by an error or Ctrl-C too (without a block: `close()`). A
    forward pass that ended in an error leaves nothing; layers that gradient checkpointing computes anew in the backward
    pass are not seen twice. Padding tokens are tokens.

    seen.steps       a dict for each forward pass (each token, in `generate`): module name -> Routing, on CPU and
                     detached. experts_TK and weights_TK are what the experts were given; logits_TE what the router
                     gave (with its bias or softcap; where it gave probabilities, their logarithm), in float32.
    seen.routings()  all passes in one: module name -> Routing of all their tokens, for `handful.observe`.
    seen.scores      what routing.scores_TE is, by module name: that of "softmax", "sigmoid" and "sqrtsoftplus" of the
                     logits that the weights are proportional to; "unknown", and the softmax, if none could be told.

    tokens   forward passes are forgotten, oldest first, beyond this many tokens; `seen.forgotten` counts them. A token
             takes 8·E + 12·K bytes a layer (weights in float32): 16384 tokens of OLMoE's 16 layers, 160 MB.

    ConfigError for a model whose experts cannot be reached. RoutingError, at its forward pass, for a model whose router
    cannot: none beside the experts, or one with more choices than experts (Zaya's may skip them).
    """
    passes = {model, *(module for module in model.modules() if isinstance(module, _PreTrainedModel))}
    return Watch(model, experts_of(model), passes, tokens)


_moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
