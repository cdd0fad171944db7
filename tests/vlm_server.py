"""A little server that speaks enough of vLLM's and SGLang's interfaces, with a real model behind it."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards._vlm import Row, Vlm


@dataclass
class Backend:
    """What the server is to do; `trouble` holds what goes wrong with the next requests: a state, a body or a wait."""

    vlm: Vlm
    top: Callable[[list[Tensor], str], dict[str, float]] = lambda images, text: {"Yes": -0.1, "No": -2.5}
    trouble: list[int | bytes | Callable[[], object]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    parts: list[list[str]] = field(default_factory=list)  # of every user's turn, the kinds in their order
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "tiny"}, {"id": "other"}]}
        with self.lock, torch.no_grad():
            if path == "/tokenize":
                return {"tokens": self.vlm.encode(body["prompt"])}
            if path == "/generate":
                return self.generate(body)
            return self.chat(body)

    def chat(self, body: dict[str, Any]) -> Any:
        assert body["model"] == "tiny"
        sent, text = content(body["messages"][0])
        self.parts.append([part["type"] for part in body["messages"][0]["content"]])
        images = [self.vlm.look.fit(image[None])[0] for image in sent]
        if body.get("top_logprobs"):
            top = [{"token": t, "logprob": p} for t, p in self.top(sent, text).items()]
            return {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
        label = self.vlm.encode(body["messages"][1]["content"])
        closing = [] if body["continue_final_message"] else [self.vlm.end, *self.vlm.encode("\n")]
        prefix = self.vlm.prefix(images, text)
        logp = self.vlm.echo([Row(images, prefix, [*label, *closing])])[0].tolist()
        entries = [
            {str(i): {"logprob": p, "decoded_token": self.vlm.words.decode([i])}, "0": {"logprob": 0.0}}
            for i, p in zip([*prefix[1:], *label, *closing], [*[-1.0] * (len(prefix) - 1), *logp], strict=True)
        ]
        return {"prompt_logprobs": [None, *entries]}

    def generate(self, body: dict[str, Any]) -> Any:
        images = [self.vlm.look.fit(decoded(url)[None])[0] for url in body.get("image_data", [])]
        text, head = body["text"], "<|im_start|>user\n"
        pads, middle = (
            "<|vision_start|><|image_pad|><|vision_end|>" * len(images),
            "<|im_end|>\n<|im_start|>assistant\n",
        )
        if not text.startswith(head):
            ids = self.vlm.encode(text)
            entries = [[None, i, self.vlm.words.decode([i])] for i in ids]
        else:
            query, label = text.removeprefix(head + pads).split(middle)
            closed = label.endswith("<|im_end|>")
            said = [*self.vlm.encode(label.removesuffix("<|im_end|>")), *[self.vlm.end] * closed]
            prefix = self.vlm.prefix(images, query)
            logp = self.vlm.echo([Row(images, prefix, said)])[0].tolist()
            entries = [[None, i, None] for i in prefix] + [[p, i, None] for p, i in zip(logp, said, strict=True)]
        return {"meta_info": {"input_token_logprobs": entries}}


def content(message: dict[str, Any]) -> tuple[list[Tensor], str]:
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    (text,) = [part["text"] for part in message["content"] if part["type"] == "text"]
    return [decoded(url) for url in urls], text


def decoded(url: str) -> Tensor:
    file = io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) / 255


@contextmanager
def serving(backend: Backend) -> Iterator[str]:
    """The address of a server that runs in threads of this process."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            with backend.lock:
                trouble = backend.trouble.pop(0) if backend.trouble else None
                backend.paths.append(self.path)
                backend.keys.append(self.headers.get("Authorization"))
            if callable(trouble):
                trouble()
            state = trouble if isinstance(trouble, int) else 200
            answer = trouble if isinstance(trouble, bytes) else b"overloaded"
            if state == 200 and not isinstance(trouble, bytes):
                answer = json.dumps(backend.reply(self.path, body)).encode()
            try:
                self.send_response(state)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
            except OSError:  # the client has gone
                pass

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
