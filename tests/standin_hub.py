"""A small stand-in for the Hugging Face hub on loopback, for tests that must not need the internet.

It answers the routes that ``huggingface_hub.snapshot_download`` uses: a repository's commit, its files (always
recursive, in one page), and each file or a range of its bytes, at ``main`` or at the commit. No file is said to be
in LFS or Xet storage, so all of them go over plain HTTP.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import unquote

Failure = Literal["none", "unauthorized", "not_found", "cut_off", "unavailable", "stalled"]

_ROUTE = re.compile(
    r"/(?P<api>api/)?(?P<kind>models/|datasets/)?(?P<name>.+?)"
    r"(/(?P<action>revision|tree|resolve)/(?P<revision>[^/]+)(/(?P<file>.+))?)?"
)


@cache
def _blob_id(path: Path, size: int, mtime_ns: int) -> str:
    """Git's name for the file's content, which is the hub's ETag; the other arguments are for the cache alone."""
    return hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest()


def _listing(folder: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """A commit made from the names and the contents of the folder's files, and its tree entries by path."""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, stat = path.relative_to(folder).as_posix(), path.stat()
        oid = _blob_id(path, stat.st_size, stat.st_mtime_ns)
        entries[name] = {"type": "file", "path": name, "size": stat.st_size, "oid": oid}
    return hashlib.sha1(json.dumps(entries).encode(), usedforsecurity=False).hexdigest(), entries


class _Server(ThreadingHTTPServer):
    """Keeps account of its open connections, so that closing it can end their threads."""

    daemon_threads = False  # server_close() joins only threads that are no daemons
    request_queue_size = 64

    def __init__(self, hub: StandInHub) -> None:
        self.hub, self.stopping, self.connections = hub, threading.Event(), set[Any]()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that hung up is no news
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request, then closes the connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing on stderr."""

    def do_GET(self) -> None:
        server = cast(_Server, self.server)
        server.hub.requests.append(f"{self.command} {self.path}")
        if server.hub.failure == "stalled":
            server.stopping.wait()
            self.close_connection = True
        elif server.hub.failure == "unavailable":
            self._send(503, {"error": "Service Unavailable"}, {})
        elif server.hub.failure == "unauthorized":
            # huggingface.co may leave out the code, but huggingface_hub guesses it from https addresses only.
            self._error(401, "RepoNotFound", "Invalid username or password.")
        else:
            self._route(server.hub)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _route(self, hub: StandInHub) -> None:
        path, mark, query = self.path.partition("?")
        route = _ROUTE.fullmatch(path)
        name = (route["kind"] or "models/") + route["name"] if route else ""
        if hub.failure == "not_found" or route is None or name not in {**hub.repos, **hub.aliases}:
            self._error(404, "RepoNotFound", "Repository not found")
        elif name in hub.aliases:
            canonical = hub.aliases[name].partition("/")[2]
            target = path[: route.start("name")] + canonical + path[route.end("name") :] + mark + query
            self._send(307, {"error": f"Redirecting to {target}"}, {"Location": target})
        else:
            commit, entries = _listing(hub.repos[name])
            action = (route["api"] or "") + (route["action"] or "revision")
            file = unquote(route["file"] or "")
            if unquote(route["revision"] or "main") not in ("main", commit):
                self._error(404, "RevisionNotFound", f"Invalid rev id: {route['revision']}")
            elif action == "resolve" and file in entries:
                headers = {"X-Repo-Commit": commit, "ETag": f'"{entries[file]["oid"]}"', "Accept-Ranges": "bytes"}
                self._send_file(hub.repos[name] / file, headers, hub.cut_after if hub.failure == "cut_off" else None)
            elif action == "api/tree" and not file:
                self._send(200, list(entries.values()), {})
            elif action == "api/revision" and not file:
                files = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in entries.values()]
                self._send(200, {"id": name.partition("/")[2], "sha": commit, "siblings": files}, {})
            else:
                self._error(404, "EntryNotFound", "Entry not found")

    def _send_file(self, path: Path, headers: dict[str, str], cut_after: int | None) -> None:
        body = path.read_bytes()
        status, start, size, keep = 200, 0, len(body), None
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and int(asked[1]) < size:
            start, stop = int(asked[1]), int(asked[2] or size) + 1
            status, body = 206, body[start:stop]
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{size}"
        if cut_after is not None and size > cut_after:  # no request ever gets beyond the middle of the file
            keep = min(len(body) // 2, max(0, size // 2 - start))
        self._send(status, body, headers, keep)

    def _error(self, status: int, code: str, message: str) -> None:
        """Fail in the hub's manner, which tells the reason in headers and as JSON."""
        self._send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: object, headers: Mapping[str, str], keep: int | None = None) -> None:
        """Send bytes, or anything else as JSON; with ``keep``, break off after so many bytes of the body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        fixed = {"Content-Type": kind, "Content-Length": str(len(data)), "Connection": "close"}
        for key, value in {**fixed, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:keep])


class StandInHub:
    """Serves folders as hub repositories on a loopback port, for as long as its ``with`` block lasts.

    ``repos`` maps "models/OWNER/NAME" or "datasets/OWNER/NAME" to a folder, read anew for each request; ``aliases``
    maps such a name to one in ``repos``, to which requests are redirected, as the hub does for "datasets/ag_news".
    ``failure`` says how requests fail from now on: "unauthorized" as for a private repository without a token;
    "cut_off" in the middle of each file of more than ``cut_after`` bytes, with the metadata intact; "stalled"
    without any answer until the hub is closed. ``requests`` has the lines "GET /api/models/...", query included.
    """

    def __init__(self, repos: Mapping[str, Path], aliases: Mapping[str, str] | None = None) -> None:
        self.repos = {name: Path(folder) for name, folder in repos.items()}
        self.aliases = dict(aliases or {})
        self.failure: Failure = "none"
        self.cut_after = 1024
        self.requests: list[str] = []  # appending is atomic
        self._server: _Server | None = None

    @property
    def endpoint(self) -> str:
        """The hub's address, to be given as ``endpoint`` or ``HF_ENDPOINT``; known inside the ``with`` block."""
        assert self._server is not None, "the hub is not running"
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StandInHub:
        """Start to listen."""
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Drop every connection, stop, and wait for all threads."""
        if server := self._server:
            server.stopping.set()
            server.shutdown()
            self._thread.join()
            for connection in list(server.connections):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            server.server_close()
            self._server = None
