"""A Hugging Face hub on loopback, for tests of downloads: a folder of repositories goes in, HTTP comes out.

It answers as the real one does, with xet off: lists of files with sizes and hashes, commits, ETags, ranges, If-Range,
large files by a redirect to a second host name (the CDN) that must get no token. A test can script what goes wrong: a
`Fault` for a file, or a whole reply for any path.
"""

import hashlib
import json
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE = 1 << 14


@dataclass
class Fault:
    """What goes wrong with the body of a file, `times` times: the rest of the fields say how."""

    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # the connection ends after so many bytes of the body
    stall_after: int | None = None  # nothing comes any more, the connection stays
    body: Callable[[bytes], bytes] | None = None  # other bytes, with the length of the true ones unless `headers` say
    ignores_range: bool = False
    etag: str | None = None
    content_range: str | None = None


@dataclass(frozen=True)
class Request:
    """One request that came."""

    method: str
    host: str
    path: str
    headers: dict[str, str]
    status: int


Script = Callable[["Request"], tuple[int, dict[str, str], bytes] | None]


class FakeHub:
    """A hub with the repositories root/ORG/NAME; one commit each, on main."""

    def __init__(self, root: Path, large_bytes: int = 4096, token: str | None = None) -> None:
        self.root, self.large_bytes, self.token = root, large_bytes, token
        self.faults: dict[str, list[Fault]] = {}
        self.scripts: list[Script] = []
        self.log: list[Request] = []
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.bytes_per_s: float | None = None
        self.other_cdn_etag = ""
        self.listing: Callable[[dict[str, Any]], Any] = lambda reply: reply
        self._stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url, self.cdn_url = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"

    def start(self) -> None:
        """Serve until `stop`."""
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Free the port; stalled replies end."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def files(self, repository: str) -> dict[str, Path]:
        """All files of a repository by their names in it."""
        folder = self.root / repository
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def commit(self, repository: str) -> str:
        """The commit that main leads to: another one for other files."""
        parts = (f"{name}{_hashes(path).sha256}" for name, path in self.files(repository).items())
        return hashlib.sha1("".join(parts).encode()).hexdigest()

    def bodies(self, name: str) -> list[Request]:
        """The requests for the bytes of a file that were not redirected."""
        return [request for request in self.log if request.path.endswith(f"/{name}") and request.status < 300]

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        parts = urllib.parse.urlsplit(handler.path)
        path = urllib.parse.unquote(parts.path)
        host = (handler.headers.get("Host") or "").partition(":")[0]
        request = Request(handler.command, host, path, dict(handler.headers.items()), 0)
        for script in self.scripts:
            scripted = script(request)
            if scripted is not None:
                return self._send(handler, request, *scripted)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            return self._send(handler, request, *self._revision(request, match[1], match[2]))
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return self._file(handler, request, match[1], match[2], "")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(handler, request, match[1], match[2], match[3])
        return self._send(handler, request, *_refused(404, "RepoNotFound"))

    def _is_allowed(self, request: Request) -> bool:
        return self.token is not None and request.headers.get("Authorization") == f"Bearer {self.token}"

    def _hidden(self, request: Request, repository: str) -> bool:
        is_there = (self.root / repository).is_dir()
        return not is_there or (repository in self.private and not self._is_allowed(request))

    def _revision(self, request: Request, repository: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        if self._hidden(request, repository):
            return _refused(401, "RepoNotFound")
        commit = self.commit(repository)
        if revision not in ("main", "v1", commit):
            return _refused(404, "RevisionNotFound")
        siblings = []
        for name, path in self.files(repository).items():
            hashes = _hashes(path)
            entry: dict[str, Any] = {"rfilename": name, "size": hashes.num_bytes, "blobId": hashes.git}
            if hashes.num_bytes >= self.large_bytes:
                entry["lfs"] = {"sha256": hashes.sha256, "size": hashes.num_bytes, "pointerSize": 134}
            siblings.append(entry)
        reply = {"_id": "0" * 24, "id": repository, "sha": commit, "private": False, "siblings": siblings}
        reply = self.listing(reply)
        body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        return 200, {"Content-Type": "application/json"}, body

    def _resolve(
        self, handler: BaseHTTPRequestHandler, request: Request, repository: str, commit: str, name: str
    ) -> None:
        if self._hidden(request, repository):
            return self._send(handler, request, *_refused(401, "RepoNotFound"))
        if repository in self.gated and not self._is_allowed(request):
            return self._send(handler, request, *_refused(403, "GatedRepo"))
        place = self.files(repository).get(name)
        if place is None or commit != self.commit(repository):
            return self._send(handler, request, *_refused(404, "EntryNotFound"))
        hashes = _hashes(place)
        if hashes.num_bytes < self.large_bytes:
            return self._file(handler, request, repository, name, hashes.git)
        headers = {
            "Location": f"{self.cdn_url}/cdn/{repository}/{urllib.parse.quote(name)}",
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{hashes.sha256}"',
            "X-Linked-Size": str(hashes.num_bytes),
            "ETag": f'"{hashes.git}"',
        }
        fault = next(iter(self.faults.get(name, [])), None)
        if fault is not None and fault.etag is not None:
            headers["X-Linked-Etag"] = f'"{fault.etag}"'
        return self._send(handler, request, 302, headers, b"")

    def _take_fault(self, name: str) -> Fault:
        faults = self.faults.get(name, [])
        if not faults:
            return Fault()
        faults[0].times -= 1
        return faults[0] if faults[0].times > 0 else faults.pop(0)

    def _file(self, handler: BaseHTTPRequestHandler, request: Request, repository: str, name: str, etag: str) -> None:
        path = self.files(repository)[name]
        data, fault = path.read_bytes(), self._take_fault(name)
        tag = f'"{etag or self.other_cdn_etag or _hashes(path).git[:32]}"'
        if fault.status is not None and fault.status >= 300:
            return self._send(handler, request, fault.status, fault.headers, b"no")
        start, status = 0, 200
        match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        is_same = request.headers.get("If-Range", tag) == tag
        if match and is_same and not fault.ignores_range:
            start, status = int(match[1]), 206
            if start >= len(data):
                return self._send(handler, request, 416, {"Content-Range": f"bytes */{len(data)}"}, b"")
        body = data[start:]
        headers = {"ETag": tag, "Accept-Ranges": "bytes", "Content-Length": str(len(body))}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if fault.content_range is not None:
                headers["Content-Range"] = fault.content_range
        body = fault.body(body) if fault.body is not None else body
        self._head(handler, request, status, {**headers, **fault.headers})
        self._pour(handler, body, fault)
        return None

    def _pour(self, handler: BaseHTTPRequestHandler, body: bytes, fault: Fault) -> None:
        end = min(len(body), *(at for at in (fault.cut_after, fault.stall_after, len(body)) if at is not None))
        for at in range(0, end, PIECE):
            piece = body[at : min(at + PIECE, end)]
            handler.wfile.write(piece)
            if self.bytes_per_s:
                time.sleep(len(piece) / self.bytes_per_s)
        handler.wfile.flush()
        if fault.stall_after is not None:
            self._stopping.wait(20)
        handler.close_connection = True
        if end < len(body):
            handler.connection.shutdown(socket.SHUT_RDWR)

    def _head(self, handler: BaseHTTPRequestHandler, request: Request, status: int, headers: dict[str, str]) -> None:
        self.log.append(Request(request.method, request.host, request.path, request.headers, status))
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.end_headers()

    def _send(
        self, handler: BaseHTTPRequestHandler, request: Request, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        self._head(handler, request, status, {"Content-Length": str(len(body)), **headers})
        handler.wfile.write(body)


def _handler_of(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                hub.respond(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _refused(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": "no \x1b[2J"}, b"{}"


@dataclass(frozen=True)
class Hashes:
    """What names the bytes of a file."""

    num_bytes: int
    sha256: str
    git: str


def _hashes(path: Path) -> Hashes:
    status = path.stat()
    return _hashed(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _hashed(path: Path, _changed_ns: int, _num_bytes: int) -> Hashes:
    data = path.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return Hashes(len(data), hashlib.sha256(data).hexdigest(), git)


@contextmanager
def running(root: Path, **options: Any) -> Iterator[FakeHub]:
    """A hub that serves while this is open."""
    hub = FakeHub(root, **options)
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()
