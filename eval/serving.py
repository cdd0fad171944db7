"""A report shown to a browser on this machine, or through a tunnel to it. It reads; it never writes."""

from __future__ import annotations

import re
import shutil
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from diffalign.types import UserError

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")  # what a browser may call it; any port, for tunnels have ports of their own
PAGE, EXTRA = "index.html", ("report.json", "report.md")
ICON = "/favicon.ico"  # browsers ask for it unbidden and complain when it is not there
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".md": "text/plain; charset=utf-8",
    ".webp": "image/webp",
    ".png": "image/png",
}
POLICY = "default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def report_file(folder: Path, target: str) -> Path | None:
    """The file of the report that a request names; None for anything else that lies in the folder, or outside it."""
    parts = unquote(urlsplit(target).path).split("/")[1:]
    if parts == [""]:
        parts = [PAGE]
    if any(part in ("", ".", "..") or re.search(r"[\\\x00-\x1f]", part) for part in parts):
        return None
    page = len(parts) == 1 and parts[0] in (PAGE, *EXTRA)
    thumbnail = len(parts) == 2 and parts[0] == "img" and parts[1].endswith(".webp")
    original = len(parts) == 3 and parts[1] == "images" and parts[2].endswith(".png")
    if not (page or thumbnail or original):
        return None
    path = folder.joinpath(*parts).resolve()  # of a link where it leads
    return path if path.is_relative_to(folder.resolve()) and path.is_file() and path.suffix in TYPES else None


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; everything else is refused by http.server with 501."""

    folder: ClassVar[Path]
    protocol_version = "HTTP/1.1"
    server_version = "diffalign"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        # A page elsewhere can point its own name at this address; only the Host header tells.
        if re.sub(r":\d+$", "", self.headers.get("Host", "")).lower() not in NAMES:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "Open this report as localhost")
            return
        if self.path == ICON:
            self.send_response(HTTPStatus.NO_CONTENT)
            self.end_headers()
            return
        path = report_file(self.folder, self.path)
        if path is None:
            self.send_error(HTTPStatus.NOT_FOUND, "The report has no such file")
            return
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", TYPES[path.suffix])
                self.send_header("Content-Length", str(size))
                self.send_header("Content-Security-Policy", POLICY)
                self.send_header("X-Content-Type-Options", "nosniff")
                self.send_header("Cross-Origin-Resource-Policy", "same-origin")
                self.send_header("Referrer-Policy", "no-referrer")
                self.send_header("Cache-Control", "no-cache")
                self.end_headers()
                if body:
                    shutil.copyfileobj(file, self.wfile)
        except (BrokenPipeError, ConnectionResetError):  # the browser went on to something else
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: a page of pictures would fill the terminal."""


def server(folder: Path | str, port: int = 0) -> ThreadingHTTPServer:
    """Listening on the loopback interface; port 0 takes a free one. The caller runs and closes it.

    Raises UserError when there is no page in `folder` or the port is taken.
    """
    path = Path(folder)
    if not (path / PAGE).is_file():
        raise UserError(f"'{path}' holds no {PAGE}; write it with `diffalign report {path}`")
    try:
        return ThreadingHTTPServer((HOST, port), type("ReportHandler", (Handler,), {"folder": path.resolve()}))
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} of {HOST} cannot be used ({error}); choose another with --port") from error


def serve(folder: Path | str, port: int = 0) -> None:
    """Show the report until interrupted."""
    with server(folder, port) as running:
        number = running.server_address[1]
        print(f"http://localhost:{number}/ shows {folder}; Ctrl-C ends it", flush=True)
        print(f"from another machine: ssh -L {number}:localhost:{number} THIS_MACHINE", file=sys.stderr, flush=True)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            return
