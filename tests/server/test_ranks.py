"""A model with its experts spread over processes: the same answers, and what becomes of them when processes go.

Real processes, killed and stopped. What is compared bit by bit is asked where no answer may be made without experts.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import chat_model
from serving_ranks import COMPLETIONS, Ranks, asked, children, command, running, whole

from handful.engine import Engine
from handful.families.io import load_decoder, save
from handful.generate import token_request
from handful.sampling import Sampling

EXPERTS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a long context, so that an answer takes a while, and a shared expert."""
    path = tmp_path_factory.mktemp("served") / "tiny"
    save(chat_model(router={"experts": EXPERTS, "top_k": 2}, context=50_000, shared_width=12), path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# The same bits.


def in_one_process(folder: Path, bits: int | None, number: int) -> tuple[list[int], list[float]]:
    model = load_decoder(folder, quantize=bits)
    body = asked(number)
    request = token_request(model, body["prompt"], max_tokens=12, sampling=Sampling(temperature=0), logprobs=1)
    (job,) = [Engine(model).submit(request)]
    engine = Engine(model)
    job = engine.submit(request)
    seen = []
    while engine.busy:
        seen += [delta.logprobs.token for delta in engine.step() if delta.logprobs is not None]
    return job.made, seen


@pytest.mark.parametrize(("dtype", "quant"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8")])
def test_the_bits_of_one_process(tmp_path: Path, dtype: torch.dtype, quant: str | None) -> None:
    """Whatever the number of ranks, and with copies of experts; also while experts are placed anew in the middle."""
    own = tmp_path / "tiny"
    save(chat_model(dtype, router={"experts": EXPERTS, "top_k": 2}, shared_width=12), own)
    options = ("--quant", quant) if quant else ()
    with running(own, "--on-loss", "wait", "--no-measure", *options, ranks=2) as ranks:
        again = {"return_tokens_as_token_ids": True}
        found = [ranks.post(**asked(number), **again)["choices"][0]["logprobs"] for number in range(8)]
        assert ranks.state()["ranks"][0]["assignments"] > 0
        moved = ranks.http.post("/ranks/replace", json={"seconds": 30}).json()
        assert moved["begun"]
        assert moved["settled"]
        assert found == [ranks.post(**asked(number), **again)["choices"][0]["logprobs"] for number in range(8)]
    for number, said in enumerate(found):
        made, values = in_one_process(own, 8 if quant else None, number)
        assert said["tokens"] == [f"token_id:{token}" for token in made]
        assert said["token_logprobs"] == values


def test_another_placement_in_the_middle(folder: Path) -> None:
    """An answer goes on through one after another, and not one bit of it is another."""
    with running(folder, "--replace-every", "0.4", "--no-measure") as ranks:
        alone = [ranks.post(**asked(number, max_tokens=400))["choices"] for number in range(3)]
        moved = 0
        for number, right in enumerate(alone):
            before = ranks.state()["maps"]
            found: list[Any] = []
            body = asked(number, max_tokens=400)
            thread = threading.Thread(target=lambda body=body, found=found: found.append(ranks.post(**body)))
            thread.start()
            while thread.is_alive():
                moved += ranks.http.post("/ranks/replace", json={"seconds": 20}).json()["moved"]
            if not ranks.state()["outages"]:  # as where others leave a rank no time for its beats
                assert [answer["choices"] for answer in found] == [right]
            assert ranks.state()["maps"] > before + 1
        assert moved > 0


# ---------------------------------------------------------------------------------------------------------------------
# What is lost.


def test_a_rank_is_killed(folder: Path) -> None:
    """While requests stream: none is lost, they go on in a moment. The others have all experts soon, and then the rank
    is back with those that it had."""
    with running(folder) as ranks:
        state = ranks.until(whole)
        held = {rank["rank"]: rank["experts"] for rank in state["ranks"]}
        killed = ranks.pid(1)
        streams = [ranks.stream(1500) for _ in range(3)]
        time.sleep(0.5)
        os.kill(killed, signal.SIGKILL)
        lost = time.monotonic()
        body = asked(1, max_tokens=3)
        answer = ranks.post(**body)
        assert time.monotonic() - lost < 6
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == 3
        for thread, lines, _ in streams:
            thread.join(120)
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert lines[-2:] == ["data: [DONE]", ""]
            assert events[-1]["choices"][0]["finish_reason"] == "length"
            assert not any("error" in event for event in events)
        state = ranks.until(lambda state: state["outages"] and whole(state))
        outage = next(outage for outage in state["outages"] if outage["rank"] == 1)
        assert outage["whole_seconds"] < 6
        assert outage["back_seconds"] is not None
        assert ranks.pid(1) != killed
        assert {rank["rank"]: rank["experts"] for rank in state["ranks"]} == held
        assert state["degraded"] is None
        assert "degraded" not in ranks.post(**body)
        assert ranks.http.get("/health").status_code == 200


def test_what_is_lost_is_told(folder: Path) -> None:
    """A rank that is stopped is out within two seconds; where the others have no room for its experts, answers are made
    without them, and say which, and what that costs. It wakes, and is one of them again."""
    expert = 4096  # a page: these experts are small
    with running(folder, "--memory", str((EXPERTS + 2) * expert), ranks=2) as ranks:
        state = ranks.until(whole)
        body = asked(2, max_tokens=20)
        right = ranks.post(**body)
        experts = next(rank["experts"] for rank in state["ranks"] if rank["rank"] == 0)
        pid = ranks.pid(0)
        os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            first = ranks.post(**body)
            assert time.monotonic() - began < 5
            state = ranks.until(lambda state: state["gone"] == [0])
            gone = time.monotonic()
            found = ranks.post(**body)
            assert found["degraded"]["layers"] == experts
            assert found["degraded"]["experts"] == sum(map(len, experts.values()))
            assert found["degraded"]["of"] == 2 * EXPERTS
            assert set(found["degraded"]) == {"layers", "experts", "of", "loss"}
            assert found["choices"][0]["logprobs"] != right["choices"][0]["logprobs"]
            assert len(first["choices"][0]["logprobs"]["tokens"]) == 20
            # As if the request had asked to do without them.
            asked_off = ranks.post(**body, experts_off=experts)
            assert asked_off["choices"] == found["choices"]
            with ranks.http.stream("POST", COMPLETIONS, json={**body, "stream": True}) as answer:
                lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
            assert all(json.loads(line[6:])["degraded"]["layers"] == experts for line in lines)
            state = ranks.until(lambda state: state["degraded"] and state["degraded"]["loss"], 60)
            loss = state["degraded"]["loss"]
            assert loss["tokens"] > 500
            assert loss["more"] == pytest.approx(loss["without"] - loss["whole"], abs=1e-5)
            assert abs(loss["more"]) > 0
            assert ranks.http.get("/ready").status_code == 200
            metrics = ranks.http.get("/metrics").text
            assert 'handful:ranks_alive{model_name="tiny"} 1.0' in metrics
            assert f'handful:experts_missing{{model_name="tiny"}} {found["degraded"]["experts"]}.0' in metrics
            woken = time.monotonic()
        finally:
            os.kill(pid, signal.SIGCONT)
        state = ranks.until(whole)
        assert ranks.pid(0) == pid
        assert ranks.post(**body)["choices"] == right["choices"]
        assert "degraded" not in ranks.post(**body)
        assert state["outages"][-1]["whole_seconds"] >= round(woken - gone, 3)


def test_waiting_is_exact(folder: Path) -> None:
    """With --on-loss wait what is lost is read when it is needed: slower, and with the bits of all experts."""
    expert = 4096
    with running(
        folder, "--on-loss", "wait", "--no-measure", "--memory", str((EXPERTS + 2) * expert), ranks=2
    ) as ranks:
        right = [ranks.post(**asked(number))["choices"] for number in range(6)]
        pid = ranks.pid(1)
        os.kill(pid, signal.SIGSTOP)
        try:
            found = [ranks.post(**asked(number)) for number in range(6)]
            ranks.until(lambda state: state["gone"] == [1])
        finally:
            os.kill(pid, signal.SIGCONT)
        assert [answer["choices"] for answer in found] == right
        assert not any("degraded" in answer for answer in found)
        ranks.until(whole)


def test_the_front_is_killed(folder: Path) -> None:
    """Meanwhile who asks is told to come again; then all is as it was."""
    with running(folder, "--no-measure", "--on-loss", "wait") as ranks:
        right = ranks.post(**asked(3))["choices"]
        front = next(int(pid) for pid in children(ranks.process._process.pid) if "server.front" in command(pid))
        os.kill(front, signal.SIGKILL)
        statuses: set[Any] = set()
        end = time.monotonic() + 60
        found = None
        while found is None:
            assert time.monotonic() < end, ranks.said()
            try:
                answer = httpx.post(ranks.url + COMPLETIONS, json=asked(3), timeout=60)
            except httpx.TransportError:  # it was killed with this connection
                statuses.add("broken")
                continue
            statuses.add(answer.status_code)
            if answer.status_code == 503:
                assert answer.headers["retry-after"] == "1"
                assert answer.json()["error"]["code"] == "unavailable"
                time.sleep(0.05)
            else:
                found = answer.json()["choices"]
        assert 503 in statuses
        assert statuses <= {200, 503, "broken"}
        assert found == right
        ranks.until(whole)
        assert "the front has ended (signal 9); it is started again" in ranks.said()


def test_nobody_outlives_the_supervisor(folder: Path) -> None:
    ranks = Ranks(folder, ranks=2)
    pids = children(ranks.process._process.pid)
    assert len([pid for pid in pids if "handful." in command(pid)]) == 3
    ranks.http.close()
    ranks.process.kill()
    ranks.process.wait()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "handful." in command(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
