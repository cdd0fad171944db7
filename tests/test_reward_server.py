"""What `diffalign serve-reward` does with requests that are large, slow, odd or from strangers."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest
import torch
from reward_servers import IMAGES, METADATA, PROMPTS, ROOT, post, remote, served

from diffalign import cli, rewards
from diffalign.reward_server import HELD
from diffalign.rewards import _wire
from diffalign.types import UserError


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
        "must be lists": json.dumps(whole | {"prompts": {"a": 1, "b": 2}}).encode(),
        "without lone surrogates": json.dumps(whole | {"prompts": ["a", "\ud800"]}).encode(),
        "must be Unicode text": json.dumps(whole | {"metadata": [{}, {"tag": ["\udfff"]}]}).encode(),
        "more than 1000000 values": b"[" + b"{}," * 600_000 + b"{}]",
        "image 0 is no base64": json.dumps(whole | {"images": [whole["images"][0][:-40], whole["images"][1]]}).encode(),
        "must have one size": json.dumps(whole | {"images": [whole["images"][0], *small]}).encode(),
    }


@pytest.mark.parametrize("said", list(bodies()))
def test_odd_requests_are_one_sentence(said: str) -> None:
    with served("jpeg", largest=4 << 20) as (server, _):
        status, answer = post(server, bodies()[said])
    assert status == 400 and said in answer["error"]


def declared(width: int, height: int) -> str:
    """The beginning of a PNG that says it is so large; nothing of it can be decoded."""
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + struct.pack("!I4sII", 13, b"IHDR", width, height)).decode()


@pytest.mark.parametrize(
    ("count", "width", "height", "fits"),
    [
        (_wire.IMAGES + 1, 1, 1, False),
        (_wire.IMAGES, 1, 1, True),
        (1, _wire.PIXELS, 1, True),
        (1, _wire.PIXELS + 1, 1, False),
        (16, 2048, 2048, True),
        (17, 2048, 2048, False),
        (2, 2**31, 2**31, False),
    ],
)
def test_pictures_are_counted_and_measured_before_any_is_decoded(
    count: int, width: int, height: int, fits: bool
) -> None:
    body = {"images": [declared(width, height)] * count, "prompts": [""] * count, "metadata": [{}] * count}
    with pytest.raises(_wire.Refused, match="image 0 is no base64 of a PNG" if fits else "too much for one request"):
        _wire.read_question(json.dumps(body).encode())


def test_stalled_requests_hold_up_nobody_and_their_bodies_are_bounded() -> None:
    body = _wire.question(IMAGES[:1], PROMPTS[:1], METADATA[:1])
    head = f"POST /score HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with served("jpeg", largest=len(body)) as (server, _), ExitStack() as open_ones:

        def stall(part: bytes) -> None:
            open_ones.enter_context(socket.create_connection(server.server_address[:2])).sendall(head + part)

        def wait_for(held: int) -> None:
            for _ in range(3000):
                if server.held == held:
                    return
                threading.Event().wait(0.01)
            raise AssertionError(f"{server.held} bytes are held, not {held}")

        for _ in range(20):
            stall(b"")
        assert post(server, body)[0] == 200
        for _ in range(HELD):
            stall(body[:-1])
        wait_for(HELD * (len(body) - 1))
        status, said = post(server, body)
        assert status == 503 and "ask again later" in said["error"]
        open_ones.close()
        wait_for(0)
        assert post(server, body)[0] == 200


def test_only_names_of_this_machine_reach_a_server_bound_to_it() -> None:
    body = _wire.question(IMAGES[:1], PROMPTS[:1], METADATA[:1])
    with served("jpeg") as (server, _):
        for host in ("evil.example", "evil.example:8600", "127.0.0.1.evil.example", "[", "", "user@evil.example"):
            status, said = post(server, body, {"Host": host})
            assert status == 403 and "answers to localhost alone" in said["error"]
        for host in ("localhost:8600", "LOCALHOST", "127.0.0.1", "[::1]:8600"):
            assert post(server, body, {"Host": host})[0] == 200


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
        monkeypatch.setenv("MY_TOKEN", " s3cret\r\n")
        assert remote(url, key_env="MY_TOKEN")(IMAGES, PROMPTS, METADATA).scores.isnan().sum() == 0
        for wrong in ("s3cr\u20act", "s3cret\nX-Other: 1"):
            monkeypatch.setenv("MY_TOKEN", wrong)
            with pytest.raises(UserError, match="variable MY_TOKEN must hold ASCII") as error:
                remote(url, key_env="MY_TOKEN")
            assert "s3cr" not in str(error.value)


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


def test_a_token_that_no_header_can_carry_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFALIGN_REWARD_TOKEN", "t\xf6ken")
    assert cli.main(["serve-reward", "--device", "cpu", "--reward", "jpeg"]) == 2
    error = capsys.readouterr().err
    assert "DIFFALIGN_REWARD_TOKEN must hold ASCII characters" in error and "t\xf6ken" not in error
