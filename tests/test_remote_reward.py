"""A reward behind HTTP scores as it does here; whatever goes wrong on the way is a reason, not a crash and not a 0."""

from __future__ import annotations

import http.client
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffalign
from diffalign import cli, rewards
from diffalign.reward_server import RewardServer
from diffalign.rewards import _wire
from diffalign.types import RewardOutput, UserError

ROOT = Path(diffalign.__file__).parent.parent
IMAGES = (torch.rand(5, 3, 8, 6, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
PROMPTS = ["a", "fail", "skip", "caf\xe9 \u2028", ""]
METADATA: list[dict[str, Any]] = [{"bonus": i, "nested": {"k": [1, None]}} for i in range(5)]


def moody(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
    failed = [p == "fail" for p in prompts]
    scores = images.mean((1, 2, 3)) + torch.tensor([float(m["bonus"] + len(m["nested"])) for m in metadata])
    scores = scores.masked_fill(torch.tensor([p == "skip" for p in prompts]), torch.nan)
    return RewardOutput(scores, {"error": ["no\x1b[31m\nred" if f else None for f in failed]}, ~torch.tensor(failed))


def bug(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    raise RuntimeError("secret")


def picky(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    raise UserError("set height to 64")


@contextmanager
def served(name: str, largest: int = 1 << 20, token: str | None = None) -> Iterator[tuple[RewardServer, str]]:
    (scorer,) = rewards.build([name if "." not in name else f"{__name__}{name}"]).values()
    with RewardServer(scorer, "127.0.0.1", 0, 2, largest, token) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def remote(url: str, **options: Any) -> rewards.Scorer:
    return rewards.build([{"name": "remote", "url": url, "retries": 0, "timeout": 20, **options}])["remote"]


def post(server: RewardServer, body: bytes, headers: Mapping[str, str] = {}) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    try:
        connection.request("POST", "/score", body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_scores_are_those_of_the_head_itself(batch: int) -> None:
    local = rewards.build([f"{__name__}.moody"])["moody"](IMAGES, PROMPTS, METADATA)
    with served(".moody") as (_, url):
        far = remote(url, batch=batch, concurrency=2)(IMAGES, PROMPTS, METADATA)
    assert torch.equal(far.scores.nan_to_num(-1), local.scores.nan_to_num(-1))
    assert far.valid is not None and far.valid.tolist() == [True, False, True, True, True]
    assert far.scores.isnan().tolist() == [False, True, True, False, False]
    assert far.extra["error"] == [None, "no [31m red", None, None, None]  # no control character reaches a terminal


def test_eight_bit_images_arrive_exactly_and_others_rounded() -> None:
    images, prompts, metadata = _wire.read_question(_wire.question(IMAGES, PROMPTS, METADATA))
    assert torch.equal(images, IMAGES) and prompts == PROMPTS and metadata == METADATA
    between = (IMAGES + 0.3 / 255).clamp(0, 1)
    assert (_wire.read_question(_wire.question(between, PROMPTS, METADATA))[0] - between).abs().max() <= 0.5 / 255


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


def test_requests_over_the_limit_are_refused_and_the_rest_goes_on() -> None:
    one = len(_wire.question(IMAGES[:1], PROMPTS[:1], METADATA[:1]))
    with served("jpeg", largest=2 * one) as (server, url):
        assert remote(url, batch=1)(IMAGES, PROMPTS, METADATA).scores.isnan().sum() == 0
        output = remote(url, batch=4)(IMAGES, PROMPTS, METADATA)  # 4 + 1 images
        assert output.valid is not None and output.valid.tolist() == [False] * 4 + [True]
        assert "lower `batch`" in output.extra["error"][0]
        status, said = post(server, b" " * (2 * one + 1))
        assert status == 413 and f"at most {2 * one} are taken" in said["error"]
        status, _ = post(server, b"", {"Content-Length": str(1 << 62)})  # never sent, hence never read
        assert status == 413
        assert post(server, _wire.question(IMAGES[:1], PROMPTS[:1], METADATA[:1]))[0] == 200


def bodies() -> dict[str, bytes]:
    whole = json.loads(_wire.question(IMAGES[:2], PROMPTS[:2], METADATA[:2]))
    small = json.loads(_wire.question(IMAGES[:1, :, :4], [""], [{}]))["images"]
    return {
        "must be a JSON object": b"\x80\x04 no pickle is read here",
        "JSON object of images": b"[]",
        "of images, prompts and metadata": b"[" * 100_000,
        "one entry an image": json.dumps(whole | {"prompts": ["a"]}).encode(),
        "prompts must be texts": json.dumps(whole | {"prompts": ["a", 3]}).encode(),
        "image 1 is no base64 of a PNG": json.dumps(whole | {"images": [whole["images"][0], "R0lG"]}).encode(),
        "must have one size": json.dumps(whole | {"images": [whole["images"][0], *small]}).encode(),
    }


@pytest.mark.parametrize("said", list(bodies()))
def test_odd_requests_are_one_sentence(said: str) -> None:
    with served("jpeg") as (server, _):
        status, answer = post(server, bodies()[said])
    assert status == 400 and said in answer["error"]


def test_web_pages_and_strangers_are_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    body = _wire.question(IMAGES[:1], PROMPTS[:1], METADATA[:1])
    with served("jpeg") as (server, _):
        assert post(server, body, {"Content-Type": "text/plain"})[0] == 415
    with served("jpeg", token="s3cret") as (server, url):
        assert post(server, body)[0] == 401
        assert post(server, body, {"Authorization": "Bearer s3cre"})[0] == 401
        with pytest.raises(UserError, match="HTTP 401.*token is missing or wrong.*mend url and key_env"):
            remote(url)
        monkeypatch.setenv("MY_TOKEN", "s3cret")
        assert remote(url, key_env="MY_TOKEN")(IMAGES, PROMPTS, METADATA).scores.isnan().sum() == 0


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
        ({"url": "http://127.0.0.1:9", "retries": 0}, "cannot be asked .*; start `diffalign serve-reward` there"),
        ({"url": "http://127.0.0.1:9", "batch": 0}, "batch: "),
    ],
)
def test_a_server_that_is_not_there_is_found_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        rewards.build([{"name": "remote", **options}])


def test_the_command_serves_until_it_is_interrupted() -> None:
    command = [
        sys.executable,
        "-m",
        "diffalign",
        "serve-reward",
        "--reward",
        "jpeg:quality=50",
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stderr is not None
        said = process.stdout.readline()
        assert said.startswith("'jpeg' is served at http://127.0.0.1:")
        far = remote(said.split()[4])(IMAGES, PROMPTS, METADATA)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and errors == "interrupted\n"
    finally:
        process.kill()
        process.communicate()
    near = rewards.build([{"name": "jpeg", "quality": 50}])["jpeg"](IMAGES, PROMPTS, METADATA)
    assert torch.equal(far.scores, near.scores)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--reward", "jpeg,geneval"], "a server has one reward, got jpeg, geneval"),
        (["--reward", "jpeg", "--megabytes", "0"], "--megabytes must be at least 1"),
        (["--reward", "jpeg", "--port", "70000"], "cannot listen on 127.0.0.1, port 70000"),
        (["--reward", "jpeg", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve-reward", "--device", "cpu", *args]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
