"""A reward behind HTTP, so that a scorer whose dependencies conflict with the trainer's has an environment of its own.

The protocol is that of `rewards/_wire.py`. Nothing that a client sends is run or unpickled.
"""

from __future__ import annotations

import hmac
import json
import socket
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import torch

from diffalign import rewards
from diffalign.rewards import _wire
from diffalign.rewards._server import own
from diffalign.types import UserError

SECONDS = 10  # that a client may take to say the next bit
AT_ONCE = 2  # requests whose images are decoded: one is scored, the next one made ready
HELD = 4  # times the largest request: bytes of bodies in memory
DRAINED = 1 << 26  # bytes of a refused body that are read all the same, for its sender to hear why


class RewardServer(ThreadingHTTPServer):
    """Listens as soon as it is made; `serve_forever` answers, `server_address` tells the port.

    Args:
        scorer: the reward, used by one request at a time.
        port: 0 = any free one.
        batch: images scored at once.
        largest: bytes that a request may have.
        token: what clients must send as `Authorization: Bearer TOKEN`; None = nothing.

    Raises UserError when the address cannot be listened on.
    """

    daemon_threads = True

    def __init__(
        self, scorer: rewards.Scorer, host: str, port: int, batch: int, largest: int, token: str | None = None
    ) -> None:
        self.scorer, self.batch, self.largest, self.token = scorer, batch, largest, token
        self.turn, self.room = threading.Lock(), threading.BoundedSemaphore(AT_ONCE)
        self.held, self.counting = 0, threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen on {host}, port {port}: {error}; choose another --port or --host"
            ) from error
        self.private = own(str(self.server_address[0]))

    @torch.no_grad()
    def score(self, body: bytearray) -> dict[str, Any]:
        with self.room:
            images, prompts, metadata = _wire.read_question(body)
            with self.turn:
                parts = [slice(i, i + self.batch) for i in range(0, len(images), self.batch)]
                found = [self.scorer(images[i].float() / 255, prompts[i], metadata[i]) for i in parts]
        return _wire.answer(rewards.joined(found))

    def hold(self, size: int) -> bool:
        """Count so many more bytes of bodies, less when negative; False, and not counted, when they are too many."""
        with self.counting:
            if size > 0 and self.held + size > HELD * self.largest:
                return False
            self.held += size
            return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news; anything else is told in full here, and not to the client."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = SECONDS

    def do_GET(self) -> None:
        if self._allowed():
            about = {"reward": self.server.scorer.reward.key, "largest": self.server.largest}
            self._say(*((200, about) if self.path == "/health" else (404, "there are /health and /score")))

    def do_POST(self) -> None:
        if not self._allowed():
            return
        length = self._length()
        if self.path != "/score":
            self._refuse(404, "there are /health and /score")
        # a web page that the user has open can send other types to this machine, but not this one
        elif self.headers.get_content_type() != "application/json":
            self._refuse(415, "the body must be application/json")
        elif length is None:
            self._refuse(411, "the request has no Content-Length")
        elif length > self.server.largest:
            self._refuse(413, f"the request has {length} bytes, at most {self.server.largest} are taken")
        else:
            self._score(length)

    def _score(self, length: int) -> None:
        body = bytearray()
        try:
            while len(body) < length and (part := self.rfile.read1(min(length - len(body), 1 << 16))):
                if not self.server.hold(len(part)):
                    return self._refuse(503, "too many requests at once; ask again later")
                body += part
            self._say(*self._scored(body))
        finally:
            self.server.hold(-len(body))

    def _scored(self, body: bytearray) -> tuple[int, Any]:
        try:
            return 200, self.server.score(body)
        except _wire.Refused as error:
            return 400, str(error)
        except UserError as error:
            return 422, str(error)
        except Exception as error:  # whatever the head does wrong; the client retries, the details stay here
            traceback.print_exc()
            return 500, f"the reward failed: {type(error).__name__}"

    def _allowed(self) -> bool:
        # a web page that the user has open can make its own name lead to this machine, and read what is answered
        if self.server.private and not own(_name(self.headers.get("Host", "localhost"))):
            self._refuse(403, "this server answers to localhost alone; ask for it by that name")
            return False
        given, token = self.headers.get("Authorization", ""), self.server.token
        if token is None or hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return True
        self._refuse(401, "the token is missing or wrong")
        return False

    def _refuse(self, status: int, sentence: str) -> None:
        self._say(status, sentence)
        left = min(self._length() or 0, DRAINED)
        while left > 0 and (part := self.rfile.read(min(left, 1 << 16))):
            left -= len(part)

    def _length(self) -> int | None:
        said = self.headers.get("Content-Length", "")
        return int(said) if said.isascii() and said.isdigit() and len(said) < 20 else None

    def _say(self, status: int, said: Any) -> None:
        body = json.dumps(said if status == 200 else {"error": said}, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """No line for every request."""


def _name(host: str) -> str:
    """Of a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
