"""From a TOML file, a preset and options to a model and its training: what counts, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from builders import dense, moe, tiny_data, training

from handful.config import BalanceConfig, ModelConfig, RouterConfig, TrainConfig
from handful.errors import CheckpointError, ConfigError
from handful.families.io import save
from handful.model import Decoder
from handful.presets import ACTIVE_WIDTH, PRESETS, small_model, small_training
from handful.runs import Run
from handful.settings import (
    BALANCE_WEIGHT,
    BIAS_RATE,
    START_LR,
    Asked,
    named_balance,
    resumed_settings,
    training_settings,
)

VOCAB = 60


def asked(
    folder: Path,
    text: str = "",
    *,
    router: str | None = None,
    balance: str | None = None,
    start: str | None = None,
    only: str | None = None,
    **given: dict[str, Any],
) -> Asked:
    """What a file of that text and those options ask for; an empty text is no file."""
    file = folder / "settings.toml"
    file.write_text(text, encoding="utf-8")
    return training_settings(file if text else None, router, balance, given, start=start, only=only)


def model_of(folder: Path, text: str = "", **options: Any) -> ModelConfig:
    return asked(folder, text, **options).model(VOCAB)


def router_of(folder: Path, text: str = "", **options: Any) -> RouterConfig:
    router = model_of(folder, text, **options).router
    assert router is not None
    return router


def refused(folder: Path, text: str = "", **options: Any) -> str:
    """The one line that says what is wrong."""
    with pytest.raises(ConfigError) as caught:
        asked(folder, text, **options).model(VOCAB)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# What counts.


def test_nothing_asked_is_the_small_model(tmp_path: Path) -> None:
    nothing = asked(tmp_path)
    assert nothing.model(VOCAB) == small_model(VOCAB)
    assert nothing.train == small_training(dtype="auto")
    assert nothing.origin == {}


def test_an_option_counts_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    text = """
    router = "olmoe"
    [data]
    source = "a.txt"
    vocab = 400
    [model]
    width = 32
    layers = 2
    [train]
    steps = 7
    lr = 0.25
    """
    both = asked(
        tmp_path, text, data={"source": "b.txt", "tokenizer": None}, model={"width": 48, "heads": None},
        train={"lr": 0.5, "seed": 3},
    )  # fmt: skip
    assert both.origin == {"source": "b.txt", "vocab": 400}
    model = both.model(VOCAB)
    assert (model.width, model.layers, model.heads) == (48, 2, 4)  # an option, the file, the small model
    assert model.router == PRESETS["olmoe"].router
    assert (both.train.lr, both.train.steps, both.train.seed) == (0.5, 7, 3)
    assert both.train.balance == PRESETS["olmoe"].balance
    # Another router on the command line brings its own balance, and leaves the rest of the file as it is.
    other = asked(tmp_path, text, router="mixtral")
    assert router_of(tmp_path, text, router="mixtral") == PRESETS["mixtral"].router
    assert (other.train.balance, other.train.steps) == (PRESETS["mixtral"].balance, 7)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_name_gives_a_model_that_builds(name: str, tmp_path: Path) -> None:
    found = asked(tmp_path, router=name, model={"width": 16, "layers": 2})
    assert found.train.balance == PRESETS[name].balance
    model = found.model(VOCAB)
    assert model.router == PRESETS[name].router
    with warnings.catch_warnings(action="ignore"):  # GShard is not causal
        built = Decoder(model)
    assert len(list(built.moe_layers)) >= 1
    assert built.embed.weight.shape == (VOCAB, 16)


@pytest.mark.parametrize("by_option", [True, False])
def test_a_dense_model(by_option: bool, tmp_path: Path) -> None:
    written = {"router": "none"} if by_option else {"text": 'router = "none"'}
    found = asked(tmp_path, **written, model={"width": 32})  # type: ignore[arg-type]
    model = found.model(VOCAB)
    assert (model.router, model.ffn, model.expert_width, model.width) == (None, ACTIVE_WIDTH, 0, 32)
    assert found.train.balance == BalanceConfig()
    assert model_of(tmp_path, 'router = "none"\n[model]\nffn = 24').ffn == 24


def test_a_dense_model_has_no_experts_and_nothing_to_balance(tmp_path: Path) -> None:
    no_experts = "router = 'none': a dense model has no experts, top_k or [model.router]"
    assert refused(tmp_path, router="none", model={"experts": 4}) == no_experts
    assert refused(tmp_path, router="none", model={"top_k": 1}) == no_experts
    assert refused(tmp_path, 'router = "none"\n[model.router]\nexperts = 4\ntop_k = 1') == no_experts
    no_balance = "train.balance: a dense model (router = 'none') has nothing to balance"
    assert refused(tmp_path, router="none", balance="switch") == no_balance
    assert refused(tmp_path, router="none", balance="loss-free") == no_balance
    assert asked(tmp_path, router="none", balance="none").train.balance == BalanceConfig()


def test_a_router_on_the_command_line_replaces_the_files_table(tmp_path: Path) -> None:
    text = "[model.router]\nexperts = 6\ntop_k = 3\n"
    assert router_of(tmp_path, text) == RouterConfig(experts=6, top_k=3)
    assert router_of(tmp_path, text, router="mixtral") == PRESETS["mixtral"].router
    assert model_of(tmp_path, text, router="none").router is None


def test_a_table_replaces_the_presets_router_and_keeps_its_balance(tmp_path: Path) -> None:
    text = 'router = "switch"\n[model.router]\nexperts = 6\ntop_k = 3\nscore = "sigmoid"\n'
    found = asked(tmp_path, text)
    model = found.model(VOCAB)
    assert model.router == RouterConfig(experts=6, top_k=3, score="sigmoid")  # without Switch's jitter and capacity
    assert (model.activation, model.moe_every) == ("relu", 2)
    assert found.train.balance == PRESETS["switch"].balance


def test_experts_top_k_and_expert_width(tmp_path: Path) -> None:
    model = model_of(tmp_path, model={"experts": 6, "top_k": 4})
    assert model.router == RouterConfig(experts=6, top_k=4)
    assert model.expert_width == ACTIVE_WIDTH // 4
    wide = model_of(tmp_path, router="deepseek-moe", model={"experts": 12, "top_k": 2, "expert_width": 10})
    assert wide.router == RouterConfig(experts=12, top_k=2, normalize=False)
    assert (wide.expert_width, wide.shared_width) == (10, 20)
    # In the file as on the command line, and over a table.
    text = "[model]\nexperts = 9\n[model.router]\nexperts = 6\ntop_k = 3"
    assert router_of(tmp_path, text, model={"top_k": 2}) == RouterConfig(experts=9, top_k=2)


def test_one_expert_of_a_token_is_not_normalised(tmp_path: Path) -> None:
    assert PRESETS["64x2"].router.normalize
    assert not router_of(tmp_path, model={"top_k": 1}).normalize
    assert router_of(tmp_path, model={"top_k": 1, "experts": 1}).normalize  # a single expert: nothing is routed


def test_tokens_become_steps(tmp_path: Path) -> None:
    def steps(text: str = "", **train: int) -> int:
        return asked(tmp_path, text, train={"batch": 4, "context": 8, **train}).train.steps

    assert [steps(tokens=count) for count in (1, 32, 63, 64)] == [1, 1, 1, 2]
    assert steps("[train]\ntokens = 320") == 10
    # An option replaces whichever the file has.
    assert steps("[train]\ntokens = 320", steps=3) == 3
    assert steps("[train]\nsteps = 3", tokens=320) == 10


def test_a_context_longer_than_the_small_models_makes_the_model_longer(tmp_path: Path) -> None:
    assert model_of(tmp_path, train={"context": 512}).context == 512
    assert model_of(tmp_path, "[model]\ncontext = 1000").context == 1000
    assert model_of(tmp_path, "[model]\ncontext = 20").context == small_training().context


# ---------------------------------------------------------------------------------------------------------------------
# Balance.


@pytest.mark.parametrize("kind", ["switch", "global", "sequence", "gshard"])
def test_a_balance_loss_takes_the_presets_weight(kind: str) -> None:
    assert named_balance(kind, None) == BalanceConfig(loss=kind, weight=BALANCE_WEIGHT)  # type: ignore[arg-type]
    assert named_balance(kind, PRESETS["mixtral"]) == BalanceConfig(loss=kind, weight=0.02)  # type: ignore[arg-type]


def test_the_other_balances() -> None:
    assert named_balance("none", PRESETS["mixtral"]) == BalanceConfig()
    assert named_balance("loss-free", PRESETS["mixtral"]) == BalanceConfig(bias_rate=BIAS_RATE)
    with pytest.raises(
        ConfigError, match=r"^balance = 'lossfree': one of none, switch, global, sequence, gshard, loss-free$"
    ):
        named_balance("lossfree", None)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {"balance": "loss-free"}),
        ('balance = "loss-free"', {}),
        ("[train.balance]\nbias_rate = 0.001", {}),
        ('balance = "switch"', {"balance": "loss-free"}),
        ('[train.balance]\nloss = "switch"\nweight = 1', {"balance": "loss-free"}),
        ("[model.router]\nexperts = 4\ntop_k = 2", {"balance": "loss-free"}),
    ],
)
def test_loss_free_sets_the_rate_and_the_routers_bias(text: str, options: dict[str, str], tmp_path: Path) -> None:
    found = asked(tmp_path, text, **options)  # type: ignore[arg-type]
    assert found.train.balance == BalanceConfig(bias_rate=BIAS_RATE)
    router = found.model(VOCAB).router
    assert router is not None
    assert router.balance_bias


def test_other_balances_leave_the_router_alone(tmp_path: Path) -> None:
    assert not router_of(tmp_path, balance="global").balance_bias
    assert asked(tmp_path, router="mixtral", balance="global").train.balance == BalanceConfig(
        loss="global", weight=PRESETS["mixtral"].balance.weight
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimizer]\nlr = 1", "optimizer: no such setting; there are balance, data, model, router, train"),
        ("data = 'x.txt'", "data = 'x.txt': a table of settings"),
        ("train = [1]", "train = [1]: a table of settings"),
        ("[data]\nsauce = 'x'", "data.sauce: no such setting; there are source, column, tokenizer, vocab"),
        ("[data]\nvocab = 'many'", "data.vocab = 'many': of type int"),
        ("[data]\nvocab = true", "data.vocab = True: of type int"),
        ("[data]\nsource = 3", "data.source = 3: of type str"),
        ("[model]\nwidht = 3", "model.widht: no such setting; there are "),
        ("[model]\nwidth = 'wide'", "model.width = 'wide': of type int"),
        ("[model]\nwidth = 1.5", "model.width = 1.5: of type int"),
        ("[model]\nexperts = '8'", "model.experts = '8': of type int"),
        ("[model]\ntop_k = true", "model.top_k = True: of type int"),
        ("[model]\nlayers = 2.0", "model.layers = 2.0: of type int"),
        ("[model]\nlayers = 0", "model.layers = 0: at least 1"),
        ("[model]\nexpert_width = [8]", "model.expert_width = [8]: of type int"),
        ("[model]\ncontext = 'long'", "model.context = 'long': of type int"),
        ("[model]\ntop_k = 65", "router.top_k = 65: from 1 to experts = 64"),
        ("[model]\ntop_k = 0", "router.top_k = 0: from 1 to experts = 64"),
        ("[model]\nrouter = 'olmoe'", "model.router = 'olmoe': of type dict"),
        ("[model.router]\nexperts = 4", "model.router.top_k: needed and not given"),
        ("[model.router]\nexperts = 4\ntopk = 2", "model.router.topk: no such setting; there are "),
        ("[model.router]\nexperts = 'four'\ntop_k = 2", "model.router.experts = 'four': of type int"),
        ("[train]\nstep = 3", "train.step: no such setting; there are "),
        ("[train]\nlr = 'high'", "train.lr = 'high': of type float"),
        ("[train]\nlr = true", "train.lr = True: of type float"),
        ("[train]\nsteps = 0", "train.steps = 0: at least 1"),
        ("[train]\ntokens = 'all'", "train.tokens = 'all': of type int"),
        ("[train]\ntokens = 0", "train.tokens = 0: at least 1"),
        ("[train]\ntokens = 9\nsteps = 9", "train.tokens, train.steps: give one of them"),
        ("[train]\nbalance = 'switch'", "train.balance = 'switch': a table of settings"),
        ("router = 3", "router = 3: of type str"),
        ("router = 'gpt-4'", "router preset 'gpt-4': one of "),
        ("balance = 3", "balance = 3: of type str"),
        ("balance = 'best'", "balance = 'best': one of none, switch, global, sequence, gshard, loss-free"),
        ("balance = 'none'\n[train.balance]\nbias_rate = 1.0", "balance, train.balance: give one of them"),
        ("router = ", "not TOML: "),
    ],
)
def test_a_wrong_file_is_told_with_field_and_value(text: str, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, text)


def test_a_wrong_option_and_a_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path, train={"tokens": 5, "steps": 5}) == "train.tokens, train.steps: give one of them"
    assert refused(tmp_path, train={"batch": 0}) == "train.batch = 0: at least 1"
    assert refused(tmp_path, router="gpt-4").startswith("router preset 'gpt-4': one of switch, ")
    # Before any text is read, whose tokenizer decides the vocabulary.
    with pytest.raises(ConfigError, match=r"^router\.top_k = 65: from 1 to experts = 64$"):
        asked(tmp_path, model={"top_k": 65})
    with pytest.raises(ConfigError, match=r"^config '.*none\.toml': no such file$"):
        training_settings(tmp_path / "none.toml", None, None, {})


# ---------------------------------------------------------------------------------------------------------------------
# Going on from a model.


def saved(folder: Path, router: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A checkpoint folder with a tokenizer."""
    model = Decoder(moe(router, **changes))
    model.tokenizer = tiny_data(folder).tokenizer
    save(model, folder / "model")
    return folder / "model"


def test_going_on_takes_the_models_shape_and_tokenizer(tmp_path: Path) -> None:
    start = saved(tmp_path)
    found = asked(tmp_path, start=str(start), only="experts", train={"steps": 3}, data={"source": "a.txt"})
    assert found.model(0) == moe()
    assert (found.start, found.only) == (start, "experts")
    assert found.origin == {"source": "a.txt", "tokenizer": str(start)}
    assert (found.train.steps, found.train.lr, found.train.context) == (3, START_LR, 32)  # the model's own context
    assert found.train.balance == BalanceConfig()  # the routers stay as they are
    text = 'balance = "sequence"\n[train]\nlr = 0.5\ncontext = 8\n[data]\nsource = "b.txt"'
    other = asked(tmp_path, text, start=str(start))
    assert (other.train.lr, other.train.context, other.only) == (0.5, 8, "all")
    assert other.train.balance == BalanceConfig(loss="sequence", weight=0.001)  # Qwen3's weight


@pytest.mark.parametrize(
    ("router", "changes", "balance"),
    [
        ({}, {"qk_norm": "none"}, PRESETS["mixtral"].balance),
        ({}, {"qk_norm": "head"}, PRESETS["qwen3"].balance),
        ({"normalize": False}, {"qk_norm": "full"}, PRESETS["olmoe"].balance),
        ({"score": "sigmoid", "balance_bias": True}, {"qk_norm": "full"}, PRESETS["deepseek-v3"].balance),
        ({}, {"activation": "relu"}, BalanceConfig(loss="switch", weight=BALANCE_WEIGHT)),
    ],
)
def test_the_balance_is_the_familys(
    router: dict[str, Any], changes: dict[str, Any], balance: BalanceConfig, tmp_path: Path
) -> None:
    start = saved(tmp_path, router, **changes)
    assert asked(tmp_path, start=str(start)).train.balance == balance
    none = asked(tmp_path, start=str(start), balance="none")
    assert none.train.balance == BalanceConfig()


def test_a_runs_balance_is_its_own(tmp_path: Path) -> None:
    saved(tmp_path)
    own = BalanceConfig(loss="gshard", weight=0.125)
    Run.open(tmp_path, resume=False).begin(moe(), training(balance=own), tiny_data(tmp_path))
    assert asked(tmp_path, start=str(tmp_path)).train.balance == own
    # Of a run that trained its experts alone there is nothing to learn.
    (tmp_path / "run.json").unlink()
    Run.open(tmp_path, resume=False).begin(moe(), training(), tiny_data(tmp_path), "experts")
    assert asked(tmp_path, start=str(tmp_path)).train.balance == PRESETS["qwen3"].balance


def test_what_a_model_has_is_not_given_again(tmp_path: Path) -> None:
    start: Any = str(saved(tmp_path))
    own = "the model that --from names has its own"
    assert refused(tmp_path, start=start, model={"width": 8}) == f"width: {own}"
    assert refused(tmp_path, "[model]\nlayers = 1", start=start) == f"layers: {own}"
    assert refused(tmp_path, start=start, router="olmoe") == f"router: {own}"
    assert refused(tmp_path, 'router = "olmoe"', start=start) == f"router: {own}"
    assert refused(tmp_path, start=start, data={"tokenizer": "x"}) == f"tokenizer: {own}"
    assert refused(tmp_path, "[data]\nvocab = 300", start=start) == f"vocab: {own}"
    only: Any = "gates"
    assert refused(tmp_path, only=only) == "only = 'gates': one of all, experts, routers"
    (tmp_path / "model/tokenizer.json").unlink()
    assert refused(tmp_path, start=start) == f"from = {start!r}: it has no tokenizer.json, which the text is read by"


# ---------------------------------------------------------------------------------------------------------------------
# A run that goes on.


@pytest.mark.parametrize("model", [dense(), moe({"balance_bias": True})])
def test_a_run_is_read_back_as_it_was_asked(model: ModelConfig, tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    settings = training(lr=0.1, balance=BalanceConfig(loss="switch", weight=0.5, z_weight=0.25), seed=9)
    Run.open(tmp_path / "run", resume=False).begin(model, settings, data)
    found = resumed_settings(tmp_path / "run")
    assert found.model(0) == model
    assert found.train == settings
    assert isinstance(found.train, TrainConfig)
    assert found.origin == data.origin


def test_the_text_of_a_run_is_the_text_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDFUL_CACHE", str(tmp_path / "cache"))
    data = tiny_data(tmp_path)
    Run.open(tmp_path / "run", resume=False).begin(dense(), training(), data)
    lines: list[str] = []
    again = resumed_settings(tmp_path / "run").load_data(lines.append)
    assert (again.fingerprint, again.origin) == (data.fingerprint, data.origin)
    assert lines


def test_a_run_that_began_from_a_model_reads_its_own_tokenizer(tmp_path: Path) -> None:
    data, run = tiny_data(tmp_path), Run.open(tmp_path / "run", resume=False)
    run.begin(moe(), training(), data, "routers", started=True)
    found = resumed_settings(tmp_path / "run")
    assert found.origin == {**data.origin, "tokenizer": str(tmp_path / "run/model")}
    assert (found.start, found.only) == (None, "routers")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "damaged: model = None: an object of settings"),
        (
            '{"model": {}, "train": {"dtype": "float32", "steps": 1}, "data": {"origin": {}}}',
            "damaged: data.fingerprint",
        ),
        ('{"model": {}, "train": [], "data": {}}', "damaged: train = []: an object of settings"),
        ('{"mod', "not JSON"),
    ],
)
def test_a_damaged_run_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    for read in (lambda: resumed_settings(tmp_path), lambda: Run.open(tmp_path, resume=True)):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert f"{tmp_path / 'run.json'}: {message}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^out = '.*nowhere': holds no run to resume$"):
        resumed_settings(tmp_path / "nowhere")
