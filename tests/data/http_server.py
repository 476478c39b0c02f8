"""A web server on loopback that fails on demand."""

import gzip
import re
import threading
import urllib.parse
from collections import defaultdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest


class Request(NamedTuple):
    """path: below the folder, unquoted; range: the header's value or None; bytes_sent: of the body, 0 for HEAD."""

    path: str
    range: str | None
    bytes_sent: int


class FaultyServer:
    """Serves a folder, with ranges and HTML listings; use as a context manager.

    Attributes:
        folder: what is served.
        ranges: whether it answers Range requests; False is how Python's own server does it (200 and everything).
        requests: every `Request` so far, HEAD and failed ones included.
    """

    def __init__(self, folder, ranges: bool = True):
        self.folder, self.ranges, self.requests = Path(folder), ranges, []
        self._faults, self._lock = defaultdict(list), threading.Lock()
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self, directory=str(folder)))
        self._server.daemon_threads, self._server.block_on_close = True, False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{urllib.parse.quote(path)}"

    def fail(self, path: str, kind: str, times: int | None = 1, retry_after: str = "0", seconds: float = 30) -> None:
        """Answer the next `times` requests for `path` (None: all of them) by a fault, after the faults set before.

        kind: a status ("503", "404", ...; "429" comes with `retry_after`), "drop" (the connection breaks in mid-body),
        "stall" (nothing for `seconds`), "short" (half of the body, and a Content-Length that agrees), "redirect" (to
        the same file), "no length" (all of the file until the connection closes, and no Content-Length),
        "gzip" (compressed, if the client takes that), or "ok".
        """
        with self._lock:
            self._faults[path].append([kind, times, retry_after, seconds])

    def next_fault(self, path: str) -> list | None:
        with self._lock:
            for fault in self._faults[path]:
                if fault[1] is None:
                    return fault
                if fault[1] > 0:
                    fault[1] -= 1
                    return fault
        return None

    def bytes_sent(self, path: str) -> int:
        return sum(request.bytes_sent for request in self.requests if request.path == path)

    def fetches(self, path: str) -> int:
        """Requests that brought bytes."""
        return sum(request.bytes_sent > 0 for request in self.requests if request.path == path)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, owner: FaultyServer, *args, **kwargs):
        self.owner = owner
        super().__init__(*args, **kwargs)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.respond(with_body=False)

    def do_GET(self):
        self.respond(with_body=True)

    def respond(self, with_body: bool):
        target, _, query = self.path.partition("?")
        path = urllib.parse.unquote(target).lstrip("/")
        fault = None if query else self.owner.next_fault(path)  # a redirect has led here already
        kind, _, retry_after, seconds = fault or ("ok", 0, "0", 0)
        file = Path(self.translate_path(self.path))
        if kind == "stall":
            self.record(path, 0)
            self.owner.closing.wait(seconds)
            self.close_connection = True
        elif kind.isdigit():
            self.record(path, 0)
            self.empty(int(kind), {"Retry-After": retry_after} if kind == "429" else {})
        elif kind == "redirect":
            self.record(path, 0)
            self.empty(302, {"Location": f"{target}?redirected"})
        elif file.is_dir():
            self.record(path, 0)
            super().do_GET() if with_body else super().do_HEAD()
        elif not file.is_file():
            self.record(path, 0)
            self.empty(404, {})
        else:
            self.send_file(path, file, kind, with_body)

    def send_file(self, path: str, file: Path, kind: str, with_body: bool):
        in_ranges = self.owner.ranges and kind != "no length"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if in_ranges else None
        size = file.stat().st_size
        first, last = 0, size - 1
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
        with file.open("rb") as content:
            content.seek(first)
            body = content.read(last + 1 - first)
        if kind == "short" and with_body:
            body = body[: len(body) // 2]
        is_compressed = kind == "gzip" and "gzip" in self.headers.get("Accept-Encoding", "")
        body = gzip.compress(body) if is_compressed else body
        self.send_response(206 if asked else 200)
        if is_compressed:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", self.guess_type(path))
        if kind != "no length":
            self.send_header("Content-Length", str(len(body)))
        if in_ranges:
            self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{size}")
        self.end_headers()
        sent = body[: len(body) // 2] if kind == "drop" else body
        self.record(path, len(sent) if with_body else 0)
        if with_body:
            self.wfile.write(sent)
        if kind in ("drop", "no length"):
            self.close_connection = True

    def empty(self, status: int, headers: dict):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def record(self, path: str, bytes_sent: int):
        # Before the body goes out: the client may be done, and look, before this thread runs again.
        self.owner.requests.append(Request(path, self.headers.get("Range"), bytes_sent))


@pytest.fixture
def http_server(tmp_path):
    """A `FaultyServer` of an empty folder. Elsewhere: `import tests.data.http_server as web`, then
    `http_server = web.http_server` (ruff takes an imported name for unused)."""
    folder = tmp_path / "served"
    folder.mkdir()
    with FaultyServer(folder) as server:
        yield server
