"""A reward behind HTTP scores as it does here; whatever goes wrong on the way is a reason, not a crash and not a 0."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from reward_servers import HEALTH, IMAGES, METADATA, PROMPTS, ROOT, answering, remote, served

from diffalign import rewards
from diffalign.overlap import Early
from diffalign.rewards import _pool, _wire
from diffalign.types import UserError


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_scores_are_those_of_the_head_itself(batch: int) -> None:
    local = rewards.build(["reward_servers.moody"])["moody"](IMAGES, PROMPTS, METADATA)
    with served(".moody") as (_, url):
        far = remote(url, batch=batch, concurrency=2)(IMAGES, PROMPTS, METADATA)
    assert torch.equal(far.scores.nan_to_num(-1), local.scores.nan_to_num(-1))
    assert far.valid is not None and far.valid.tolist() == [True, False, True, True, True]
    assert far.scores.isnan().tolist() == [False, True, True, False, False]
    assert far.extra["error"] == [None, "no red", None, None, None]  # no escape sequence reaches a terminal


def test_eight_bit_images_arrive_exactly_and_others_rounded() -> None:
    images, prompts, metadata = _wire.read_question(_wire.question(IMAGES, PROMPTS, METADATA))
    assert torch.equal(images / 255, IMAGES) and prompts == PROMPTS and metadata == METADATA
    between = (IMAGES + 0.3 / 255).clamp(0, 1)
    rounded = _wire.read_question(_wire.question(between, PROMPTS, METADATA))[0]
    assert rounded.dtype == torch.uint8 and (rounded / 255 - between).abs().max() <= 0.5 / 255


def test_a_server_that_dies_makes_scores_invalid() -> None:
    with served("jpeg") as (_, url):
        head = remote(url, batch=2)
        assert not head(IMAGES, PROMPTS, METADATA).scores.isnan().any()
    output = head(IMAGES, PROMPTS, METADATA)
    assert output.valid is not None and not output.valid.any() and output.scores.isnan().all()
    assert all(url in e and "cannot be asked" in e for e in output.extra["error"])


@pytest.mark.parametrize(("name", "said"), [(".bug", "HTTP 500"), (".picky", "set height to 64")])
def test_what_the_head_does_wrong_is_the_reason(name: str, said: str) -> None:
    with served(name) as (_, url):
        output = remote(url, batch=3)(IMAGES, PROMPTS, METADATA)
    assert output.valid is not None and not output.valid.any()
    assert all(said in e and "secret" not in e for e in output.extra["error"])


@pytest.mark.parametrize("state", [301, 302, 303, 307, 308])
def test_a_key_follows_no_redirection(state: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    there: list[str] = []
    with (
        answering(lambda path: (200, {}, HEALTH)) as (other, seen),
        answering(lambda path: (state, {"Location": there[0] + path}, b"")) as (url, _),
    ):
        there.append(other)
        with pytest.raises(UserError, match=f"redirects to {other}/health, which is not followed; give the final"):
            remote(url, key_env="MY_TOKEN")
    assert not seen


@pytest.mark.parametrize("health", [b'{"largest": null}', b'{"largest": "abc"}', b'{"largest": true}', b"{}", b"[3]"])
def test_what_is_no_reward_server_is_told(health: bytes) -> None:
    with answering(lambda path: (200, {}, health)) as (url, _), pytest.raises(UserError, match="is no reward server"):
        remote(url)


@pytest.mark.parametrize("score", ["NaN", "Infinity", "1e400", "1e39", '"1"', "true"])
def test_null_alone_means_that_a_reward_does_not_apply(score: str) -> None:
    said = f'{{"scores": [{score}], "valid": [true], "error": [null]}}'.encode()
    with answering(lambda path: (200, {}, HEALTH if path == "/health" else said)) as (url, _):
        output = remote(url)(IMAGES[:1], PROMPTS[:1], METADATA[:1])
    assert output.valid is not None and not output.valid.any()
    assert output.extra["error"] == ["the answer holds a score that is neither a finite number nor null"]


def test_a_stop_ends_the_repetitions() -> None:
    failed = threading.Event()

    def reply(path: str) -> tuple[int, dict[str, str], bytes]:
        if path == "/score":
            failed.set()
        return (200, {}, HEALTH) if path == "/health" else (500, {}, b"")

    with answering(reply) as (url, seen):
        scorer = remote(url, retries=9, backoff=600.0, batch=1, concurrency=2)
        with Early({"far": scorer}) as early:
            early.submit(IMAGES, PROMPTS, METADATA)
            early.submit(IMAGES, PROMPTS, METADATA)
            assert failed.wait(60)
        (thread,) = early.threads
        thread.join(60)
        assert not thread.is_alive()
        assert len(seen) <= 1 + 2  # of ten images


def test_a_call_that_raises_stops_those_after_it_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(i: int) -> int:
        if i == 1:
            raise ValueError("one")
        begun.append(i)
        if i == 2:
            release.wait(60)
        return i * i

    monkeypatch.setattr(_pool, "GRACE", 0.01)
    release = threading.Event()
    begun: list[int] = []
    pool = _pool.Pool(1)
    with pytest.raises(ValueError, match="one"):
        pool.map(call, range(9))
    release.set()
    assert pool.map(call, [10, 11]) == [100, 121] and pool.map(call, []) == []
    assert [i for i in begun if i != 2] == [0, 10, 11]


def test_ctrl_c_does_not_wait_for_a_server_that_hangs() -> None:
    hung, release = threading.Event(), threading.Event()

    def reply(path: str) -> tuple[int, dict[str, str], bytes]:
        if path == "/score":
            hung.set()
            release.wait(600)
        return 200, {}, HEALTH

    code = (
        "import signal, sys, torch; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from diffalign import rewards\n"
        "far = rewards.build([{'name': 'remote', 'url': sys.argv[1], 'timeout': 600, 'batch': 1}])['remote']\n"
        "far(torch.zeros(9, 3, 8, 8), [''] * 9, [{}] * 9)"
    )
    with answering(reply) as (url, _):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE, text=True, env=env)
        try:
            assert hung.wait(120)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
            assert errors.strip().endswith("KeyboardInterrupt") and process.returncode in (130, -signal.SIGINT)
        finally:
            release.set()
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m\n", "red"),
        ("\x9b31mred", "red"),
        ("a\x1b]0;title\x07b\x1b]8;;http://x\x1b\\c", "abc"),
        ("\x1b(Bplain\x1bc", "plain"),
        ("torn \x1b", "torn"),
    ],
)
def test_escape_sequences_are_dropped(said: str, shown: str) -> None:
    assert _wire.line(said) == shown


@pytest.mark.parametrize(
    "answer",
    [
        {"scores": [1.0], "valid": [True], "error": [None]},
        {"scores": [1, 2]},
        [],
        {"scores": [1.0, math.inf], "valid": [True] * 2, "error": [None] * 2},
        {"scores": [1.0, 2.0], "valid": [1, 1], "error": [None] * 2},
        {"scores": ["x", "y"], "valid": [True] * 2, "error": [None] * 2},
    ],
)
def test_odd_answers_are_refused(answer: Any) -> None:
    with pytest.raises(_wire.Refused):
        _wire.read_answer(answer, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "127.0.0.1:8600"}, "is no address of a server"),
        ({"url": "http://a..b:80"}, "'http://a..b:80' is no address of a server"),
        ({"url": "http://a:99999"}, "is no address of a server"),
        ({"url": "http://a/\xe9"}, "is no address of a server"),
        ({"url": "http://a/?x=1"}, "is no address of a server"),
        ({"url": "http://127.0.0.1:9", "retries": 0}, "cannot be asked .*; start `diffalign serve-reward` there"),
        ({"url": "http://127.0.0.1:9", "batch": 0}, "batch: "),
    ],
)
def test_a_server_that_is_not_there_is_found_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        rewards.build([{"name": "remote", **options}])


@pytest.mark.parametrize(
    "url", ["http://me:pa55@host", "https://me:pa55@[::1]:80/v1", "me:pa55@host", "http://me:pa55/@h"]
)
def test_a_password_in_an_address_is_not_shown(url: str) -> None:
    with pytest.raises(UserError, match=r"\*\*\*@h?") as error:
        rewards.resolve({"name": "remote", "url": url})
    assert "pa55" not in str(error.value)
