"""The server of a report: over a real socket, what it gives, and what it refuses."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffalign.eval import serving
from diffalign.types import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "eval"
    for path, text in {
        "index.html": "<p>page", "report.json": "{}", "img/ab.webp": "thumb", "my model/images/0000_00.png": "png",
        "eval.json": "asked", "base/scores.jsonl": "scores", "img/notes.txt": "no", ".hidden": "no",
    }.items():  # fmt: skip
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (tmp_path / "secret.png").write_text("secret")
    (tmp_path / "index.html").write_text("secret")
    (folder / "img" / "link.webp").symlink_to(tmp_path / "secret.png")
    (folder / "base" / "images").symlink_to(tmp_path)
    return folder


@pytest.fixture
def port(folder: Path) -> Iterator[int]:
    with serving.server(folder) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running.server_address[1]
        running.shutdown()
        thread.join(10)


def ask(port: int, target: str, method: str = "GET", host: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, target, skip_host=True)
    connection.putheader("Host", f"localhost:{port}" if host is None else host)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, {name.lower(): value for name, value in answer.getheaders()}


def test_gives_the_files_of_the_report(port: int) -> None:
    for target in ("/", "/index.html", "/index.html?x=1"):
        status, body, headers = ask(port, target)
        assert (status, body) == (200, b"<p>page")
        assert (
            headers["content-type"].startswith("text/html")
            and "default-src 'none'" in headers["content-security-policy"]
        )
        assert headers["x-content-type-options"] == "nosniff"
    assert ask(port, "/report.json")[:2] == (200, b"{}")
    assert ask(port, "/img/ab.webp")[1] == b"thumb"
    assert ask(port, "/my%20model/images/0000_00.png")[1] == b"png"
    status, body, headers = ask(port, "/", "HEAD")
    assert (status, body, headers["content-length"]) == (200, b"", "7")


@pytest.mark.parametrize(
    "target",
    [
        "/eval.json", "/base/scores.jsonl", "/img/notes.txt", "/img/", "/img", "/.hidden", "/none.html",
        "/../index.html", "/%2e%2e/index.html", "/..%2findex.html", "/img/../../index.html", "/img/..%5csecret.png",
        "/img/link.webp", "/base/images/secret.png", "/img/%00.webp", "/img/../index.html", "http://x/eval.json", "index.html",
    ],
)  # fmt: skip
def test_nothing_else_is_given(port: int, target: str) -> None:
    status, body, _ = ask(port, target)
    assert status in (400, 404) and b"secret" not in body and body != b"no"


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", f"evil.example:{80}", "", "127.0.0.1.nip.io"]
)
def test_other_names_for_this_machine_are_refused(port: int, host: str) -> None:
    status, body, _ = ask(port, "/", host=host)
    assert status == 421 and b"page" not in body


def test_browsers_get_no_icon_and_no_error(port: int) -> None:
    assert ask(port, "/favicon.ico")[:2] == (204, b"")


def test_names_of_the_loopback_at_any_port_are_taken(port: int) -> None:
    for host in ("localhost", "127.0.0.1:1", f"LOCALHOST:{port}"):  # a tunnel has its own port
        assert ask(port, "/", host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_reading(port: int, folder: Path, method: str) -> None:
    assert ask(port, "/index.html", method)[0] == 501
    assert (folder / "index.html").read_text() == "<p>page"


def test_listens_on_the_loopback_alone(folder: Path) -> None:
    with serving.server(folder) as running:
        assert running.server_address[0] == "127.0.0.1"
        with pytest.raises(UserError, match="choose another"):
            serving.server(folder, running.server_address[1])
    with pytest.raises(UserError, match="choose another"):
        serving.server(folder, 70000)


def test_needs_a_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diffalign report"):
        serving.server(tmp_path)
