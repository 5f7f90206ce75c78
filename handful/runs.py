"""A run's folder: what was asked, what happened, and checkpoints to go on from.

    RUN/run.json                      the model, the training settings and the data
    RUN/lock                          held by the process that trains it
    RUN/events.jsonl                  what happened, one JSON object a line
    RUN/checkpoints/step-000500/      a Hugging Face checkpoint, and beside it the optimizer's state
    RUN/model -> checkpoints/step-…   the last one

A checkpoint appears whole or not at all, and the link moves after it; so a run that is killed at any moment goes on
from the last checkpoint. The last two are kept. A run that goes on from another model keeps that one as its checkpoint
of step 0, written before run.json, so it needs nothing outside its folder either.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from handful import __version__, checkpoint
from handful.config import ModelConfig, TrainConfig
from handful.config_io import to_dict
from handful.data import Data
from handful.errors import CheckpointError, ConfigError
from handful.families.io import checkpoint_files
from handful.lazy_tensors import Tensors
from handful.model import Decoder
from handful.origin import read_origin
from handful.ranks import ALONE, Ranks
from handful.spread import own_experts, read_into, read_part, whole, whole_name
from handful.text import Tokenizer

__all__ = [
    "NOTE", "Run", "check_folder", "check_free", "go_on_from", "newest_run", "read_asked", "read_events", "save_with",
    "text_behind",
]  # fmt: skip

KEPT = 2
NOTE = "handful.json"  # in a checkpoint that no run made: where it is from
TEXT = ("source", "column")  # of a data origin: what says which text
MOMENTS = ("exp_avg", "exp_avg_sq")
ASKED = {"model": (), "train": ("dtype", "steps"), "data": ("origin", "fingerprint")}  # what every run.json has


def check_folder(folder: Path) -> None:
    """ConfigError for a file in the place of a folder to write to."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out = {str(folder)!r}: a file; name a folder by --out")


def check_free(folder: Path) -> None:
    """ConfigError if the folder holds a run, or is a file."""
    check_folder(folder)
    if (folder / "run.json").exists():
        raise ConfigError(f"out = {str(folder)!r}: holds a run; go on with it by --resume, or name another by --out")


def read_asked(folder: Path) -> dict[str, Any]:
    """The run.json of a folder. ConfigError if it holds no run, CheckpointError if the file is damaged."""
    file = folder / "run.json"
    if not file.exists():
        raise ConfigError(f"out = {str(folder)!r}: holds no run to resume")
    asked = checkpoint.read_json(file)
    for section, names in ASKED.items():
        if not isinstance(asked.get(section), dict):
            raise CheckpointError(f"{file}: damaged: {section} = {asked.get(section)!r}: an object of settings")
        for name in names:
            if name not in asked[section]:
                raise CheckpointError(f"{file}: damaged: {section}.{name} is missing")
    return asked


def newest_run(folder: Path) -> Path:
    """The run below a folder that was trained last; of those in one of its subfolders (a comparison) a mixture of
    experts. ConfigError where there is none.
    """
    times = {}
    for file in folder.rglob("run.json"):
        config = file.parent / "model" / "config.json"
        if config.is_file():
            times[file.parent] = config.stat().st_mtime_ns
    if not times:
        raise ConfigError(
            f"no run in {str(folder)!r}: train one (make demo, or handful compare --out {folder}/demo), or name a model"
        )
    together = max(times, key=lambda run: times[run]).relative_to(folder).parts[0]
    runs = [run for run in times if run.relative_to(folder).parts[0] == together]
    return max(runs, key=lambda run: (read_asked(run)["model"].get("router") is not None, times[run]))


def text_behind(source: str | Path, folder: Path) -> dict[str, Any] | None:
    """The source and column of the text that a model was trained on, or made from one that was: by the run that
    `source` names or its checkpoint `folder` lies in, or by what upcycling noted there. None where nothing says it.
    """
    # RUN/model is a link to RUN/checkpoints/step-….
    for file in (Path(source) / "run.json", folder.resolve().parent.parent / "run.json"):
        if file.exists():
            origin = read_asked(file.parent)["data"]["origin"]
            return {name: origin.get(name) for name in TEXT}
    if (folder / NOTE).exists():
        noted = checkpoint.read_json(folder / NOTE).get("text")
        return {name: noted.get(name) for name in TEXT} if isinstance(noted, dict) else None
    return None


class Run:
    """An open run folder. `resumed` says that a checkpoint was found to go on from."""

    def __init__(self, folder: Path, *, resumed: bool) -> None:
        self.folder = folder
        self.resumed = resumed
        self._events = folder / "events.jsonl"
        self._has_start = False

    @classmethod
    def open(cls, folder: Path, *, resume: bool) -> Run:
        """Use a new folder, or with `resume` one that holds a run. ConfigError for the other two cases."""
        if resume:
            read_asked(folder)
        else:
            check_free(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out = {str(folder)!r}: {error.strerror}") from None
        return cls(folder, resumed=resume and _last_checkpoint(folder) is not None)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the run for this process alone; the system lets go of it when the process ends, however it does.

        ConfigError if another one has it.
        """
        try:
            file = open(self.folder / "lock", "a")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"out = {str(self.folder)!r}: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"out = {str(self.folder)!r}: another process is training this run") from None
            yield

    def last(self) -> Path | None:
        """The last whole checkpoint, if there is one."""
        return _last_checkpoint(self.folder)

    def begin(
        self, config: ModelConfig, settings: TrainConfig, data: Data, only: str = "all", *, started: bool = False
    ) -> None:
        """Write down what was asked; forget the events of an attempt that reached no checkpoint.

        started   the run goes on from a model, which its checkpoint of step 0 holds already.
        """
        if not started:  # an attempt that did may have left its own
            shutil.rmtree(self._step(0), ignore_errors=True)
        asked = {
            "handful": __version__,
            "only": only,
            "started": started,
            "model": to_dict(config),
            "train": to_dict(settings),
            "data": {**data.summary(), "origin": data.origin, "fingerprint": data.fingerprint},
        }
        checkpoint.write_file(self.folder / "run.json", asked)
        self._events.unlink(missing_ok=True)

    def check(self, config: ModelConfig, settings: TrainConfig, data: Data, only: str = "all") -> str:
        """The dtype that the run began with. ConfigError names the first setting that differs from the run's own."""
        asked = read_asked(self.folder)
        dtype = str(asked["train"]["dtype"])
        given = {"model": to_dict(config), "train": {**to_dict(settings), "dtype": dtype}}
        # A run may be older than a setting, which it has at its default then.
        default_of = {"model": {f.name: f.default for f in dataclasses.fields(ModelConfig)}, "train": {}}
        for section, values in given.items():
            for name, value in values.items():
                has = asked[section].get(name, default_of[section].get(name))
                if has != value:
                    raise ConfigError(f"{section}.{name} = {value!r}: the run in {self.folder} has {has!r}")
        if asked.get("only", "all") != only:
            raise ConfigError(f"only = {only!r}: the run in {self.folder} has {asked.get('only', 'all')!r}")
        if asked.get("started") and not self.resumed:
            raise CheckpointError(f"{self.folder}: its checkpoints are gone, and with them the model it began from")
        if asked["data"]["fingerprint"] != data.fingerprint:
            raise ConfigError(f"data: not the text, or not the tokenizer, of the run in {self.folder}")
        if settings.dtype not in ("auto", dtype):
            raise ConfigError(f"train.dtype = {settings.dtype!r}: the run in {self.folder} has {dtype!r}")
        return dtype

    def write(self, event: dict[str, Any]) -> None:
        """Append an event; a resumed run mostly has its start already. CheckpointError if the disk refuses."""
        if event["event"] == "start" and self._has_start:
            return
        try:
            with open(self._events, "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self._events}: cannot be written: {error.strerror}") from None

    def events(self) -> list[dict[str, Any]]:
        """What happened so far; a line that a kill cut off is left out."""
        return read_events(self.folder)

    def save(
        self,
        step: int,
        seconds: float,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        ranks: Ranks = ALONE,
    ) -> Path:
        """Write a checkpoint, point RUN/model at it, remove all but the last two. Returns its folder.

        ranks   that a model is spread over, of which this is the first; the others call `save_with`.
        """
        path = self._step(step)
        with whole(model, ranks, _moments(model, optimizer)) as found:
            assert found is not None
            weights, moments = found
            state = {f"{m}.{name}": of.entry(name) for m, of in moments.items() for name in of}
            files = checkpoint_files(model, tokenizer, state=weights)
            trainer = {"handful": __version__, "step": step, "seconds": seconds}
            checkpoint.write_folder(path, {**files, "trainer.safetensors": Tensors(state), "trainer.json": trainer})
        self._point(path)
        for old in _checkpoints(self.folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def restore(self, model: Decoder, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Load the last checkpoint into model and optimizer, and cut the events back to it. Returns (step, seconds).

        What a kill left undone after that checkpoint appeared, the link and the event, is done now.
        """
        path = self.last()
        if path is None:
            raise CheckpointError(f"{self.folder}: there is no checkpoint to resume from")
        step, seconds = go_on_from(path, model, optimizer)
        after = ("interrupted", "end")
        kept = [e for e in self.events() if e.get("step", 0) <= step and e["event"] not in after]
        self._has_start = any(e["event"] == "start" for e in kept)
        if step and not any(e["event"] == "checkpoint" and e["step"] == step for e in kept):
            kept.append({"event": "checkpoint", "step": step, "path": str(path)})
        checkpoint.write_file(self._events, "".join(json.dumps(e) + "\n" for e in kept))
        self._point(path)
        return step, seconds

    def _step(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def _point(self, path: Path) -> None:
        checkpoint.point(self.folder / "model", Path("checkpoints") / path.name)


def _moments(model: Decoder, optimizer: torch.optim.Optimizer) -> Callable[[str], dict[str, torch.Tensor]]:
    """What the optimizer holds of each parameter, by its name."""
    parameters = dict(model.named_parameters())

    def of(name: str) -> dict[str, torch.Tensor]:
        held = optimizer.state.get(parameters[name], {}) if name in parameters else {}
        return {moment: held[moment] for moment in MOMENTS if moment in held}

    return of


def save_with(model: Decoder, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Give rank 0 what its `Run.save` writes of this rank's. CheckpointError if it cannot be written."""
    with whole(model, ranks, _moments(model, optimizer)):
        pass


def go_on_from(path: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load a run's checkpoint into model and optimizer; of experts that are spread those of this rank. Returns (step,
    seconds)."""
    trainer = checkpoint.read_json(path / "trainer.json")
    read_into(model, path)
    model.origin = read_origin(path, checkpoint.read_json(path / "config.json"))
    state = checkpoint.read_tensors(path / "trainer.safetensors")
    # A run that went on from a model has made no step at its checkpoint of step 0.
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad} if trainer["step"] else {}
    own = own_experts(model)
    shapes = {n: (own[n].layout.experts, *p.shape[1:]) if n in own else tuple(p.shape) for n, p in trained.items()}
    checkpoint.check_tensors({f"{m}.{whole_name(n)}": shape for n, shape in shapes.items() for m in MOMENTS}, state)
    for name, parameter in trained.items():
        moments = {m: torch.empty_like(parameter) for m in MOMENTS}
        for moment, out in moments.items():
            read_part(state.entry(f"{moment}.{whole_name(name)}"), own.get(name), out)
        step = torch.tensor(float(trainer["step"]), device=parameter.device)
        optimizer.state[parameter] = {"step": step, **moments}
    return int(trainer["step"]), float(trainer["seconds"])


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run folder, up to a line that a kill cut off."""
    found = []
    try:
        lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _checkpoints(folder: Path) -> list[Path]:
    """The whole ones, oldest first: a folder under any other name is somebody's copy, or half-written."""
    steps = {p: p.name.removeprefix("step-") for p in (folder / "checkpoints").glob("step-*")}
    return sorted((p for p, step in steps.items() if step.isdecimal()), key=lambda p: int(steps[p]))


def _last_checkpoint(folder: Path) -> Path | None:
    found = _checkpoints(folder)
    return found[-1] if found else None
