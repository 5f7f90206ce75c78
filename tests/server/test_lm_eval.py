"""lm-evaluation-harness gets from the server what its own `hf` backend gets of the same checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, chat_model, serving

from handful.families.io import load, save
from handful.generate import generate_tokens
from handful.model import Decoder
from handful.sampling import Sampling

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports

CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWERS = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["==", "t"], max_gen_toks: 8, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def question_with_its_answer(model: Decoder) -> tuple[str, str]:
    """A text and the few letters that the model goes on with, where no tokenizer joins the two."""
    own = model.tokenizer
    assert own is not None
    for number in range(500):
        question = f"{chr(97 + number % 26)} router {number}"
        (token,) = generate_tokens(model, own.encode_prompt(question), 1, Sampling(temperature=0))
        piece = own.decode([token])
        if piece.isascii() and piece.isprintable() and own.encode_prompt(question + piece)[-1] == token:
            return question, piece
    raise AssertionError("none")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    model = chat_model(context=256, width=32, heads=4)
    save(model, folder / "model")
    question, answer = question_with_its_answer(model)
    rows: list[dict[str, Any]] = [{"question": question, "choices": [answer, "z", "=="], "answer": 0}]
    words = ["chooses experts", "of tokens ==", "naïve weights ☃"]
    rows += [{"question": f"the router {i}", "choices": words, "answer": i % 3} for i in range(5)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "tasks").mkdir()
    for name, task in (("choices", CHOICES), ("answers", ANSWERS)):
        (folder / "tasks" / f"{name}.yaml").write_text(task % (folder / "rows.jsonl"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Served]:
    model = load(checkpoint / "model")
    assert isinstance(model, Decoder)
    with serving(model, name="m") as found:
        yield found


def run(checkpoint: Path, kind: str, tasks: list[str], chat: bool = False, **arguments: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(checkpoint / "tasks"), include_defaults=False)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=tasks, task_manager=manager, log_samples=True, bootstrap_iters=0,
        apply_chat_template=chat,
    )  # fmt: skip
    return found


def own(checkpoint: Path, tasks: list[str], chat: bool = False, **more: Any) -> dict[str, Any]:
    path = str(checkpoint / "model")
    return run(checkpoint, "hf", tasks, chat, pretrained=path, device="cpu", dtype="float32", **more)


def answers(result: dict[str, Any], task: str) -> list[Any]:
    return [sample["filtered_resps"] for sample in sorted(result["samples"][task], key=lambda one: one["doc_id"])]


def test_completions(checkpoint: Path, served: Served) -> None:
    """Log-likelihoods and whether they are greedy, scores, and texts up to their stops."""
    url, path = f"{served.url}/v1/completions", str(checkpoint / "model")
    tasks = ["choices", "answers"]
    found = run(checkpoint, "local-completions", tasks, model="m", base_url=url, tokenizer=path, num_concurrent=2)
    want = own(checkpoint, tasks)
    greedy = []
    for ours, theirs in zip(answers(found, "choices"), answers(want, "choices"), strict=True):
        for (value, is_greedy), (right, was_greedy) in zip(ours, theirs, strict=True):
            assert value == pytest.approx(right, abs=1e-4)
            assert is_greedy == was_greedy
            greedy.append(is_greedy)
    assert any(greedy)
    assert not all(greedy)
    assert found["results"]["choices"] == want["results"]["choices"]
    assert answers(found, "answers") == answers(want, "answers")


def test_chats(checkpoint: Path, served: Served) -> None:
    url = f"{served.url}/v1/chat/completions"
    found = run(checkpoint, "local-chat-completions", ["answers"], chat=True, model="m", base_url=url)
    want = own(checkpoint, ["answers"], chat=True, add_bos_token=False)
    assert answers(found, "answers") == answers(want, "answers")
