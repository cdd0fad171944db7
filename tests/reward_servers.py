"""Reward servers that run in threads of this process: the real one, and one that says what a test wants."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffalign
from diffalign import rewards
from diffalign.reward_server import RewardServer
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


@contextmanager
def answering(reply: Callable[[str], tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[str, list[Any]]]:
    """(url, headers of each request) of a server that says what `reply` makes of a path: state, headers and body."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = reply(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
        server.shutdown()
        thread.join()


HEALTH = b'{"reward": "x", "largest": 1000000}'
