"""A vision-language model behind an OpenAI-compatible server, vLLM's or SGLang's: requests, and what they answer."""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from diffalign.rewards._pool import Pool, stopped
from diffalign.rewards._wire import line, png
from diffalign.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = (408, 425, 429, 500, 502, 503, 504)  # HTTP states that may pass
LARGEST = 2**26  # bytes of an answer
TOP = 20  # most that OpenAI's interface gives


class Server(BaseModel):
    """Where a model is served, and how it is asked. A string is short for {url: string}."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    url: str
    """Such as http://localhost:8000."""
    api: Literal["vllm", "sglang"] = "vllm"
    """Whose way to give log-probabilities of a prompt: both servers answer questions alike, but not this."""
    timeout: float = Field(60.0, gt=0)
    """Seconds to wait for an answer."""
    retries: int = Field(3, ge=0)
    """How often a request that failed is sent again."""
    backoff: float = Field(1.0, ge=0)
    """Seconds before the first repetition; each further one waits twice as long."""
    concurrency: int = Field(8, ge=1)
    """Requests under way at once."""
    key_env: str | None = None
    """Environment variable that holds the server's API key."""

    @field_validator("url")
    @classmethod
    def _root(cls, url: str) -> str:
        try:
            parts = urllib.parse.urlsplit(url)
            host = (parts.hostname or "").encode("idna")
            right = parts.scheme in ("http", "https") and host and parts.port != 0 and parts.path.isascii()
        except ValueError:
            right = False
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise ValueError(f"'{_masked(url)}' has a user or password, which are not sent; give a key with key_env")
        if not right or parts.query or parts.fragment:
            raise ValueError(f"'{_masked(url)}' is no address of a server; write it as http://localhost:8000")
        return url.rstrip("/").removesuffix("/v1")


class Failed(Exception):
    """No usable answer, after all repetitions; one sentence."""


@dataclass(frozen=True)
class Client:
    """A server that has answered, and the model to ask there."""

    server: Server
    model: str
    pool: Pool

    def answer(self, images: Sequence[Tensor], text: str, text_first: bool = False) -> dict[str, float]:
        """Log-probabilities of the likeliest next tokens, at most 20, by their spelling. Raises Failed.

        text_first: else the pictures come first.
        """
        body = {
            "model": self.model,
            "messages": [_user(images, text, text_first)],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP,
        }
        given = self._post("/v1/chat/completions", body)
        with _reading("top_logprobs", self.server):
            found = given["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            top: dict[str, float] = {}
            for entry in found:  # two tokens can have one spelling
                top[entry["token"]] = _add(top.get(entry["token"], -math.inf), _number(entry["logprob"]))
        return top

    def echo(self, images: Sequence[Tensor], text: str, label: str, end: bool) -> tuple[list[str], list[float]]:
        """The tokens of `label`, said in answer to `text`, and log p of each; `end` adds the one that ends the turn.

        Raises Failed, also when the server splits the label in another way within the chat than alone.
        """
        return (self._echo_sglang if self.server.api == "sglang" else self._echo_vllm)(images, text, label, end)

    def _echo_vllm(self, images: Sequence[Tensor], text: str, label: str, end: bool) -> tuple[list[str], list[float]]:
        plain = {"model": self.model, "prompt": label, "add_special_tokens": False}
        split = self._post("/tokenize", plain)
        with _reading("tokens", self.server):
            ids = [str(int(i)) for i in split["tokens"]]
        body = {
            "model": self.model,
            "messages": [_user(images, text), {"role": "assistant", "content": label}],
            "add_generation_prompt": False,
            "continue_final_message": not end,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 1,  # the token itself, always the first, and the likeliest
        }
        given = self._post("/v1/chat/completions", body)
        with _reading("prompt_logprobs", self.server):
            tokens: list[Mapping[str, Any]] = [entry or {} for entry in given["prompt_logprobs"]]
            at = _find([next(iter(t), "") for t in tokens], ids, end)
            said = [next(iter(t.values())) for t in tokens[at : at + len(ids) + end]]
            return [str(t["decoded_token"]) for t in said], [_number(t["logprob"]) for t in said]

    def _echo_sglang(self, images: Sequence[Tensor], text: str, label: str, end: bool) -> tuple[list[str], list[float]]:
        pads = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
        chat = f"<|im_start|>user\n{pads}{text}<|im_end|>\n<|im_start|>assistant\n{label}"
        body = {
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        alone = self._post("/generate", body | {"text": label, "return_text_in_logprobs": True})
        closed = "<|im_end|>" if end else ""
        # image tokens have ids that are in no vocabulary, hence no texts here
        whole = body | {
            "text": chat + closed,
            "image_data": [_url(i) for i in images],
            "return_text_in_logprobs": False,
        }
        given = self._post("/generate", whole)
        with _reading("input_token_logprobs", self.server):
            split = [(str(int(i)), str(t)) for _, i, t in alone["meta_info"]["input_token_logprobs"]]
            entries = given["meta_info"]["input_token_logprobs"]
            ids = [i for i, _ in split]
            at = _find([str(int(e[1])) for e in entries], ids, end)
            names = [t for _, t in split] + [closed] * end
            return names, [_number(e[0]) for e in entries[at : at + len(names)]]

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return request(self.server, path, json.dumps(body).encode())


def connect(server: Server, model: str | None) -> Client:
    """Ask the server for its models. Raises UserError when it does not answer or has no such model."""
    try:
        given = request(server, "/v1/models")
        with _reading("data", server):
            names = [str(entry["id"]) for entry in given["data"]]
    except Failed as error:
        raise UserError(f"{error}; start the server, or mend server.url") from error
    if not names or (model is not None and model not in names):
        raise UserError(
            f"{server.url} serves {line(', '.join(names)) or 'no model'}, not '{model}'; set `model` to one of them"
        )
    return Client(server, model or names[0], Pool(server.concurrency))


def request(server: Server, path: str, body: bytes | None = None) -> Any:
    """The JSON that the server answers with. Raises Failed."""
    headers = {"Content-Type": "application/json"} | _key(server)
    asked = urllib.request.Request(server.url + path, body, headers)
    # a proxy cannot reach this machine's own addresses
    direct = [urllib.request.ProxyHandler({})] if own(urllib.parse.urlsplit(server.url).hostname or "") else []
    opener = urllib.request.build_opener(_Stay, *direct)
    for attempt in range(server.retries + 1):
        if stopped(server.backoff * 2 ** (attempt - 1) if attempt else 0):
            raise Failed(f"{server.url}{path} was not asked{' again' * bool(attempt)}, since the run is stopping")
        try:
            with opener.open(asked, timeout=server.timeout) as response:
                text = response.read(LARGEST + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = f"answered HTTP {error.code}{_excerpt(error)}"
                if 300 <= error.code < 400:  # another host has no right to the key
                    to = _masked(error.headers.get("Location", "nowhere"))
                    said = f"redirects to {line(to)}, which is not followed; give the final address"
            if error.code not in AGAIN:
                break
        except (OSError, HTTPException, UnicodeError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            late = isinstance(reason, TimeoutError)
            said = f"did not answer within {server.timeout:g} s" if late else f"cannot be asked ({line(reason)})"
        else:
            try:
                if len(text) <= LARGEST:
                    return json.loads(text)
                said = f"answered with more than {LARGEST >> 20} MB"
            except ValueError:
                said = "answered with something that is not JSON"
            break
    raise Failed(f"{server.url}{path} {said}, asked {attempt + 1} time{'s' * bool(attempt)}")


@contextmanager
def _reading(what: str, server: Server) -> Iterator[None]:
    """Whatever the answer lacks becomes Failed."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration) as error:
        why = str(error) if isinstance(error, _Odd) else "is not there or has another form"
        raise Failed(f"{server.url}: {what} in the answer {why}; check server.api") from error


class _Odd(ValueError):
    """Something of the answer that its form does not tell."""


def _key(server: Server) -> dict[str, str]:
    if server.key_env is None:
        return {}
    key = secret(server.key_env)
    if key is None:
        raise UserError(f"environment variable {server.key_env} is not set; put the key of {server.url} there")
    return {"Authorization": f"Bearer {key}"}


def secret(variable: str) -> str | None:
    """What the environment variable holds, without the space around it. Raises UserError, without telling it."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"environment variable {variable} must hold ASCII characters alone, on one line, to be a key")
    return key or None


def own(host: str) -> bool:
    """A name or an address by which this machine reaches itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirection is an error."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _masked(url: str) -> str:
    return re.sub(r"^(\w+://)?.*@", r"\1***@", url, flags=re.DOTALL)


def _user(images: Sequence[Tensor], text: str, text_first: bool = False) -> dict[str, Any]:
    pictures: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _url(i)}} for i in images]
    said = [{"type": "text", "text": text}]
    return {"role": "user", "content": said + pictures if text_first else pictures + said}


def _url(image: Tensor) -> str:
    return "data:image/png;base64," + png(image)


def _find(ids: Sequence[str], label: Sequence[str], end: bool) -> int:
    """Where the label begins: it is the last of all, or with `end` the last that something follows."""
    n = len(label)
    last = len(ids) - n - end
    for at in range(last, max(last - 4, -1) if end else last - 1, -1):  # few tokens come after a turn's end
        if n and at >= 0 and list(ids[at : at + n]) == list(label):
            return at
    raise _Odd("does not end with the tokens of the prompt")


def _number(value: Any) -> float:
    number = float(value)
    if math.isnan(number):
        raise _Odd("is not a number")
    return number


def _add(a: float, b: float) -> float:
    """log(exp a + exp b)"""
    high = max(a, b)
    return high if high == -math.inf else high + math.log(math.exp(a - high) + math.exp(b - high))


def _excerpt(error: urllib.error.HTTPError) -> str:
    """The beginning of what the server says is wrong, on one line."""
    try:
        text = line(error.read(400).decode("utf-8", "replace"), 200)
    except (OSError, HTTPException):  # it breaks off
        return ""
    return f": {text}" if text else ""
