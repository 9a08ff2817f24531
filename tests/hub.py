"""A small hub on loopback that speaks enough of Hugging Face's protocol for huggingface_hub, and
fails when told to.

Files lie on another host than the hub ("localhost" and "127.0.0.1"), as on the real one, so a token
that were sent on is seen.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import urllib.parse
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

COMMIT = "c" * 40
PAGE = 5
"""Entries of a list of files that come at once."""

GATED = (403, {"X-Error-Code": "GatedRepo"})
GATED_LOGGED_OUT = (401, {"X-Error-Code": "GatedRepo"})
NO_SUCH_REPO = (401, {"X-Error-Code": "RepoNotFound"})
NO_SUCH_REVISION = (404, {"X-Error-Code": "RevisionNotFound"})
BAD_TOKEN = (401, {"X-Error-Message": "Invalid credentials in Authorization header"})


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]


class Hub:
    """repos: {repository: {path: bytes}}. What was asked for is in `requests`."""

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        self.repos, self.requests = repos, []
        self._answers: list[list] = []
        self.connections: list[socket.socket] = []
        self.cuts: list[int] = []
        """Lengths after which the next downloads break off, one each."""
        self.ignores_ranges = False
        self.short_files = False
        """Whether files come without their last byte, with a Content-Length to match."""
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self._server.daemon_threads = True
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def answer(
        self, part: str, status: int, headers: dict[str, str] | None = None, times: int = 10**9
    ) -> None:
        """Answer the next `times` requests whose path has `part` ("/tree/", "/resolve/", "/bytes/")
        with a status alone."""
        self._answers.append([part, status, headers or {}, times])

    def planned(self, path: str) -> tuple[int, dict[str, str]] | None:
        for plan in self._answers:
            if plan[0] in path and plan[3] > 0:
                plan[3] -= 1
                return plan[1], plan[2]
        return None

    def asked(self, part: str, method: str | None = None) -> list[Request]:
        return [
            request
            for request in self.requests
            if part in request.path and method in (None, request.method)
        ]

    def close(self) -> None:
        """Stop, and hang up: a client keeps connections for its next request."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        path = urllib.parse.unquote(path)
        self.hub.requests.append(
            Request(self.command, path, {k.lower(): v for k, v in self.headers.items()})
        )
        if plan := self.hub.planned(path):
            return self.reply(*plan)
        if path.startswith("/bytes/"):
            return self.send_bytes(path.removeprefix("/bytes/"))
        repo = next((repo for repo in self.hub.repos if f"/{repo}/" in path), None)
        if repo is None:
            return self.reply(*NO_SUCH_REPO)
        files = self.hub.repos[repo]
        if "/tree/" in path:
            return self.send_tree(
                files, path, int(urllib.parse.parse_qs(query).get("cursor", ["0"])[0])
            )
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name not in files:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        etag = hashlib.sha256(files[name]).hexdigest()
        place = self.hub.endpoint.replace("127.0.0.1", "localhost") + f"/bytes/{etag}"
        self.reply(
            302,
            {
                "Location": place,
                "ETag": f'"{etag}"',
                "X-Linked-ETag": f'"{etag}"',
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(len(files[name])),
            },
        )

    do_HEAD = do_GET

    def send_tree(self, files: dict[str, bytes], path: str, cursor: int) -> None:
        """A page of the recursive list of files; folders are in it, too."""
        folders = {name.rpartition("/")[0] for name in files} - {""}
        items = [{"type": "directory", "path": name, "oid": "0"} for name in sorted(folders)]
        items += [
            {"type": "file", "path": name, "oid": "1", "size": len(data)}
            for name, data in files.items()
        ]
        link = f'<{self.hub.endpoint}{path}?recursive=true&cursor={cursor + PAGE}>; rel="next"'
        more = {"Link": link} if cursor + PAGE < len(items) else {}
        self.reply(
            200,
            {"Content-Type": "application/json", **more},
            json.dumps(items[cursor : cursor + PAGE]).encode(),
        )

    def send_bytes(self, etag: str) -> None:
        everything = [data for files in self.hub.repos.values() for data in files.values()]
        data = next(data for data in everything if hashlib.sha256(data).hexdigest() == etag)
        data = data[:-1] if self.hub.short_files else data
        status, headers, start = 200, {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}, 0
        wanted = self.headers.get("Range")
        if wanted and not self.hub.ignores_ranges:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.hub.cuts.pop(0) if self.hub.cuts and self.command == "GET" else None
        self.reply(status, headers, data[start:], cut)

    def reply(
        self, status: int, headers: dict[str, str], body: bytes = b"", cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_) -> None:
        pass
