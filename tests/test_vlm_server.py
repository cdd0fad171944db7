"""Heads that ask a vision-language model behind a server: the same scores, and what happens when it fails."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vlms import BLANK, IMAGES, PROMPTS, echo, tiny
from torch import Tensor
from vlm_server import Backend, serving

from diffalign import rewards
from diffalign.overlap import Early
from diffalign.rewards import _asking, _server
from diffalign.rewards._asking import NO, YES, Local
from diffalign.rewards.yes_probability import YesProbability
from diffalign.types import UserError

FAST = {"backoff": 0.0, "retries": 2}


@pytest.fixture(scope="module")
def asked() -> Local:
    return _asking.local(tiny("qwen3_vl"), YES, NO)


def behind(url: str, name: str = "vlm_echo", model: str | None = "tiny", **options: Any) -> rewards.Scorer:
    api = options.pop("server", {})
    entry = {"name": name, "server": FAST | {"url": url} | api, **options}
    return rewards.build([entry | ({"model": model} if model else {})])[name]


@pytest.mark.parametrize("api", ["vllm", "sglang"])
@pytest.mark.parametrize("options", [{}, {"end_token": True, "gain": True}, {"pmi": True, "aggregate": "sum"}])
def test_a_server_gives_the_scores_of_its_model(asked: Local, api: str, options: dict[str, Any]) -> None:
    here = echo(asked, **options)
    with serving(Backend(asked.vlm)) as url:
        there = behind(url + "/v1/", server={"api": api, "concurrency": 3}, **options)(IMAGES, PROMPTS, BLANK)
    torch.testing.assert_close(there.scores, here.scores, atol=1e-4, rtol=0)
    assert there.valid is not None and there.valid.all()
    assert there.extra["tokens"] == here.extra["tokens"]
    for name in {"log_probs", "gain"} & set(here.extra):
        for mine, its in zip(there.extra[name], here.extra[name], strict=True):
            assert mine == pytest.approx(its, abs=1e-4)


def test_a_server_answers_yes_or_no(asked: Local) -> None:
    def top(images: list[Tensor], text: str) -> dict[str, float]:
        if len(images) == 2:
            return {"Yes": -0.2, "No": -1.8}
        return {" yes": -2.0, "YES": -3.0, "No": -0.5, "The": -4.0} if "circle" in text else {"The": -0.1, "A": -3.0}

    backend = Backend(asked.vlm, top)
    with serving(backend) as url:
        full = behind(url, "yes_probability")(IMAGES, PROMPTS, BLANK)
        odds = behind(url, "yes_probability", normalise="yes_no")(IMAGES, PROMPTS, BLANK)
        assert backend.parts == [["image_url", "text"]] * 8
        clean = behind(url, "artifact_vlm", instruction="a circle?", bias=0.7)(IMAGES, PROMPTS, BLANK)
        assert backend.parts[8:] == [["text", "image_url"]] * 4  # as published
    yes, no = np.exp(-2) + np.exp(-3), np.exp(-0.5)
    assert full.scores[0].item() == pytest.approx(yes, abs=1e-6)
    assert odds.scores[0].item() == pytest.approx(yes / (yes + no), abs=1e-6)
    assert clean.scores[0].item() == pytest.approx(no / (yes * np.exp(0.7) + no), abs=1e-6)
    assert full.valid is not None and full.valid.tolist() == [True, False, True, True]
    assert full.scores.isnan().tolist() == [False, True, False, False]
    assert full.extra["error"][1] == "neither yes nor no is among the 2 likeliest answers, of which the first is 'The'"


def test_two_failures_then_success(asked: Local) -> None:
    backend = Backend(asked.vlm)
    with serving(backend) as url:
        scorer = behind(url)
        backend.trouble += [503, 429]
        assert scorer(IMAGES[:1], PROMPTS[:1], BLANK[:1]).scores.isfinite().all()
        assert backend.paths == ["/v1/models", *["/tokenize"] * 3, "/v1/chat/completions"]


@pytest.mark.parametrize(
    ("trouble", "tries", "message"),
    [
        ([500, 500, 500], 3, "/v1/chat/completions answered HTTP 500: overloaded, asked 3 times"),
        ([404], 1, "/v1/chat/completions answered HTTP 404: overloaded, asked 1 time"),
        ([b"<html>"], 1, "/v1/chat/completions answered with something that is not JSON, asked 1 time"),
        ([b"{}"], 1, ": top_logprobs in the answer is not there or has another form; check server.api"),
    ],
)
def test_a_failure_is_not_valid_and_says_why(asked: Local, trouble: list[Any], tries: int, message: str) -> None:
    backend = Backend(asked.vlm)
    with serving(backend) as url:
        scorer = behind(url, "yes_probability", server={"concurrency": 1})
        backend.trouble += trouble
        output = scorer(IMAGES[:2], PROMPTS[:2], BLANK[:2])
        assert output.valid is not None and output.valid.tolist() == [False, True]
        assert output.scores.isnan().tolist() == [True, False]
        assert output.extra["error"] == [url + message, None]
        assert len(backend.paths) == 1 + tries + 1


def test_a_server_that_does_not_answer_in_time(asked: Local) -> None:
    backend, release = Backend(asked.vlm), threading.Event()
    with serving(backend) as url:
        scorer = behind(url, "artifact_vlm", server={"timeout": 5.0})
        slow = behind(url, "artifact_vlm", server={"timeout": 0.2, "retries": 1})
        backend.trouble += [release.wait, release.wait]
        output = slow(IMAGES[:1], PROMPTS[:1], BLANK[:1])
        release.set()
        assert output.valid is not None and not output.valid.any()
        assert output.extra["error"] == [f"{url}/v1/chat/completions did not answer within 0.2 s, asked 2 times"]
        assert scorer(IMAGES[:1], PROMPTS[:1], BLANK[:1]).scores.isfinite().all()


def test_labels_that_the_server_splits_otherwise_are_not_valid(asked: Local) -> None:
    backend = Backend(asked.vlm)
    with serving(backend) as url:
        scorer = behind(url)
        backend.trouble.append(b'{"tokens": [7, 8, 9]}')
        output = scorer(IMAGES[:1], PROMPTS[:1], BLANK[:1])
    assert "does not end with the tokens of the prompt" in output.extra["error"][0]


def test_no_more_requests_at_once_than_allowed(asked: Local) -> None:
    under_way, most, lock, meet = 0, 0, threading.Lock(), threading.Barrier(3)

    def wait() -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        meet.wait(60)  # passes only if three are here together
        with lock:
            under_way -= 1

    backend = Backend(asked.vlm)
    with serving(backend) as url:
        scorer = behind(url, "yes_probability", server={"concurrency": 3})
        backend.trouble += [wait] * 6
        images, prompts = IMAGES[[0, 1, 2, 3, 0, 1]], PROMPTS[:1] * 6
        output = scorer(images, prompts, BLANK[:1] * 6)
    assert output.scores.isfinite().all()
    assert most == 3


def test_a_server_is_asked_while_sampling_goes_on_and_a_model_here_is_not(asked: Local) -> None:
    with serving(Backend(asked.vlm)) as url:
        far = behind(url, "yes_probability", model=None)
        assert far.reward.remote and not far.reward.differentiable
        near = rewards.Scorer(YesProbability(name="yes_probability"), lambda i, p, m: [0.0] * len(p), "cpu")
        assert near.reward.differentiable and not near.reward.remote
        with Early({"far": far, "near": near}) as early:
            for part in (slice(0, 2), slice(2, 4)):
                early.submit(IMAGES[part], PROMPTS[part], BLANK[part])
            outputs = early.outputs()
    assert set(outputs) == {"far"}
    torch.testing.assert_close(outputs["far"].scores, torch.full((4,), float(np.exp(-0.1))))


def test_a_server_that_is_not_there_stops_before_the_run(asked: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(asked.vlm)
    with serving(backend) as url:
        with pytest.raises(UserError, match="serves tiny, other, not 'large'; set `model` to one of them"):
            behind(url, model="large")
        with pytest.raises(UserError, match="environment variable MY_KEY is not set"):
            behind(url, server={"key_env": "MY_KEY"})
        monkeypatch.setenv("MY_KEY", "secret")
        behind(url, server={"key_env": "MY_KEY"})
        assert backend.keys[-1] == "Bearer secret"
    with pytest.raises(UserError, match=r"/v1/models cannot be asked .*, asked 3 times; start the server"):
        behind(url)


def test_sums_of_probabilities() -> None:
    assert _server._add(-1.0, -2.0) == pytest.approx(np.logaddexp(-1.0, -2.0))
    assert _server._add(float("-inf"), -2.0) == -2.0
    assert _server._add(float("-inf"), float("-inf")) == float("-inf")
