"""Local stand-in for the Hugging Face hub, for tests without internet access.

It serves the routes of ``huggingface_hub.snapshot_download``: the commit of a repository, its list of files (always
recursive, on one page), and each file or a range of its bytes, at ``main`` or at the commit. No file is in LFS or Xet
storage, so all files are transferred over plain HTTP.

It also serves the routes of ``HfApi.create_repo``, ``create_commit`` and ``upload_folder``: creation of a repository,
validation of its card, the upload mode of each file (always within the commit), and commits to ``main`` that add,
replace or delete files.
"""

from __future__ import annotations

import base64
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

import yaml

Failure = Literal["none", "unauthorized", "not_found", "cut_off", "unavailable", "stalled", "refused_commit"]

_ROUTE = re.compile(
    r"/(?P<api>api/)?(?P<kind>models/|datasets/)?(?P<name>.+?)"
    r"(/(?P<action>revision|tree|resolve|preupload|commit)/(?P<revision>[^/]+)(/(?P<file>.+))?)?"
)
_ACCOUNT_ROUTES = ("POST /api/repos/create", "POST /api/validate-yaml", "GET /api/whoami-v2")
_USER = "me"


@cache
def _blob_id(path: Path, size: int, mtime_ns: int) -> str:
    """Return the Git blob hash of a file, which is the hub's ETag; size and mtime are part of the cache key."""
    return hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest()


def _list_files(folder: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return a commit hash computed from names and contents of the files, and the tree entries by path."""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, stat = path.relative_to(folder).as_posix(), path.stat()
        oid = _blob_id(path, stat.st_size, stat.st_mtime_ns)
        entries[name] = {"type": "file", "path": name, "size": stat.st_size, "oid": oid}
    return hashlib.sha1(json.dumps(entries).encode(), usedforsecurity=False).hexdigest(), entries


def _validate_card(card: str) -> dict[str, list[dict[str, str]]]:
    """Return the errors and warnings for the metadata of a README.md; the real hub checks more."""
    errors, metadata = [], re.match(r"---\r?\n(.*?)^---\s*$", card, re.DOTALL | re.MULTILINE)
    try:
        content = yaml.safe_load(metadata[1]) if metadata else None
    except yaml.YAMLError as error:
        errors, content = [{"message": str(error)}], {}
    missing = {"message": "empty or missing yaml metadata in repo card"}
    return {"errors": errors, "warnings": [missing] if content is None else []}


class _Server(ThreadingHTTPServer):
    """Server that records its open connections, so that closing it can end their threads."""

    daemon_threads = False  # server_close() does not join daemon threads
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
        if not isinstance(sys.exc_info()[1], ConnectionError):  # ignore closed connections
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Handler that serves one request and closes the connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    body = b""

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Do not log to stderr."""

    def do_GET(self) -> None:
        server = cast(_Server, self.server)
        server.hub.requests.append(f"{self.command} {self.path}")
        if server.hub.failure == "stalled":
            server.stopping.wait()
            self.close_connection = True
        elif server.hub.failure == "unavailable":
            self._send(503, {"error": "Service Unavailable"}, {})
        elif server.hub.failure == "unauthorized":
            self._require_login()
        else:
            self._route(server.hub)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.body = self.rfile.read(
            int(self.headers.get("Content-Length", 0))
        )  # an unread body would reset the connection
        self.do_GET()

    def _route(self, hub: StandInHub) -> None:
        path, separator, query = self.path.partition("?")
        route = _ROUTE.fullmatch(path)
        name = (route["kind"] or "models/") + route["name"] if route else ""
        if hub.failure != "not_found" and f"{self.command} {path}" in _ACCOUNT_ROUTES:
            self._serve_account(hub, path)
        elif hub.failure == "not_found" or route is None or name not in {**hub.repos, **hub.aliases}:
            self._error(404, "RepoNotFound", "Repository not found")
        elif name in hub.aliases:
            canonical = hub.aliases[name].partition("/")[2]
            target = path[: route.start("name")] + canonical + path[route.end("name") :] + separator + query
            self._send(307, {"error": f"Redirecting to {target}"}, {"Location": target})
        else:
            commit, entries = _list_files(hub.repos[name])
            action = (route["api"] or "") + (route["action"] or "revision")
            file = unquote(route["file"] or "")
            if unquote(route["revision"] or "main") not in ("main", commit):
                self._error(404, "RevisionNotFound", f"Invalid rev id: {route['revision']}")
            elif self.command == "POST" and action in ("api/preupload", "api/commit") and not file:
                self._serve_upload(hub, name, action)
            elif self.command == "POST":
                self._error(404, "EntryNotFound", "Entry not found")
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

    def _serve_account(self, hub: StandInHub, path: str) -> None:
        """Serve the routes that do not belong to an existing repository."""
        request = json.loads(self.body or b"{}")
        if path.endswith("validate-yaml"):
            result = _validate_card(request["content"])
            self._send(400 if result["errors"] else 200, result, {})
        elif not self._has_token(hub):
            pass
        elif path.endswith("whoami-v2"):
            self._send(200, {"type": "user", "name": _USER, "orgs": []}, {})
        else:
            kind, owner = request.get("type") or "model", request.get("organization") or _USER
            name = f"{kind}s/{owner}/{request['name']}"
            address = name.removeprefix("models/")
            created = {"url": f"{hub.endpoint}/{address}", "name": f"{owner}/{request['name']}"}
            if hub.uploads is None:
                self._error(403, "", f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
            elif name in {**hub.repos, **hub.aliases}:
                self._error(409, "", f"You already created this {kind} repo", created)
            else:
                hub.repos[name] = hub.uploads / address
                hub.repos[name].mkdir(parents=True, exist_ok=True)
                # The field differs between versions of huggingface_hub.
                hub.private[name] = bool(request.get("private")) or request.get("visibility") == "private"
                self._send(200, created, {})

    def _serve_upload(self, hub: StandInHub, name: str, action: str) -> None:
        """Return the upload mode of each file, or apply a commit atomically."""
        commit, entries = _list_files(hub.repos[name])
        if not self._has_token(hub):
            return
        # Repositories that were not created here are read-only, because several tests may share their folders.
        if name not in hub.private or (hub.failure == "refused_commit" and action == "api/commit"):
            self._error(403, "", "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
            return
        if action == "api/preupload":
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            answer = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": path, **answer, "oid": entries.get(path, {}).get("oid")} for path in paths]
            self._send(200, {"files": files, "commitOid": commit}, {})
            return
        header, *lines = (json.loads(line) for line in self.body.splitlines())
        changes: dict[str, bytes | None] = {}
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "deletedFile" and value["path"] not in entries:
                self._error(404, "EntryNotFound", "A file with this name doesn't exist")
                return
            if key not in ("file", "deletedFile"):
                self._error(400, "", f"The stand-in does not support {key}")
                return
            changes[value["path"]] = base64.b64decode(value["content"]) if key == "file" else None
        if header["value"].get("parentCommit", commit) != commit:
            self._error(412, "", "A commit has happened since. Please refresh and try again.")
            return
        for path, content in changes.items():
            target = hub.repos[name] / path
            if content is None:
                target.unlink()
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        _blob_id.cache_clear()  # two commits may have the same mtime
        hub.commits.append(header["value"]["summary"])
        commit, _ = _list_files(hub.repos[name])
        url = f"{hub.endpoint}/{name.removeprefix('models/')}/commit/{commit}"
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": url}, {})

    def _has_token(self, hub: StandInHub) -> bool:
        """Whether the request has the required token; otherwise, send an error response."""
        authorization = self.headers.get("Authorization")
        if hub.token is None or authorization == f"Bearer {hub.token}":
            return True
        if authorization is None:
            self._require_login()
        else:
            self._error(401, "", "Invalid credentials in Authorization header")
        return False

    def _require_login(self) -> None:
        """Reject a request without a token; the response does not reveal whether a repository exists."""
        # The real hub may omit the code, but huggingface_hub infers it for https URLs only.
        is_repository_route = f"{self.command} {self.path.partition('?')[0]}" not in _ACCOUNT_ROUTES
        self._error(401, "RepoNotFound" if is_repository_route else "", "Invalid username or password.")

    def _send_file(self, path: Path, headers: dict[str, str], cut_after: int | None) -> None:
        body = path.read_bytes()
        status, start, size, n_sent = 200, 0, len(body), None
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested and int(requested[1]) < size:
            start, stop = int(requested[1]), int(requested[2] or size) + 1
            status, body = 206, body[start:stop]
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{size}"
        if cut_after is not None and size > cut_after:  # no request gets beyond the middle of the file
            n_sent = min(len(body) // 2, max(0, size // 2 - start))
        self._send(status, body, headers, n_sent)

    def _error(self, status: int, code: str, message: str, fields: Mapping[str, str] | None = None) -> None:
        """Send an error like the hub: the message in a header and as JSON, and the code, if any, in a header."""
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, {"error": message, **(fields or {})}, headers)

    def _send(self, status: int, body: object, headers: Mapping[str, str], n_sent: int | None = None) -> None:
        """Send bytes, or other values as JSON; ``n_sent`` cuts the body off after this number of bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        defaults = {"Content-Type": kind, "Content-Length": str(len(data)), "Connection": "close"}
        for key, value in {**defaults, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:n_sent])


class StandInHub:
    """Context manager that serves folders as hub repositories on a local port.

    Attributes:
        repos: Folders by "models/OWNER/NAME" or "datasets/OWNER/NAME". They are read again for each request.
        aliases: Names in ``repos`` that other names redirect to, as the hub does for "datasets/ag_news".
        uploads: Folder for new repositories, which are added to ``repos``; None forbids them. A name without an owner
            belongs to "me".
        token: Token that uploads require, if any. Downloads never require one.
        private: Whether a new repository was requested as private, by its name in ``repos``. Downloads ignore it.
        commits: First lines of the commit messages.
        failure: How requests fail: "unauthorized" like a private repository without a token; "cut_off" in the middle
            of each file of more than ``cut_after`` bytes, with the metadata intact; "stalled" without a response until
            the hub is closed; "refused_commit" at a commit but not before.
        requests: Requests as "GET /api/models/...", including the query.
    """

    def __init__(
        self, repos: Mapping[str, Path], aliases: Mapping[str, str] | None = None, uploads: Path | None = None
    ) -> None:
        self.repos = {name: Path(folder) for name, folder in repos.items()}
        self.aliases = dict(aliases or {})
        self.uploads = uploads
        self.token: str | None = None
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.failure: Failure = "none"
        self.cut_after = 1024
        self.requests: list[str] = []  # appending is atomic
        self._server: _Server | None = None

    @property
    def endpoint(self) -> str:
        """URL for ``endpoint`` or ``HF_ENDPOINT``; available inside the ``with`` block."""
        assert self._server is not None, "the hub is not running"
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StandInHub:
        """Start the server."""
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Close all connections, stop the server and wait for its threads."""
        if server := self._server:
            server.stopping.set()
            server.shutdown()
            self._thread.join()
            for connection in list(server.connections):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            server.server_close()
            self._server = None
