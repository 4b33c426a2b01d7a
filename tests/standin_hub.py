"""Local stand-in for the Hugging Face hub, for tests without internet access.

It serves the requests of ``huggingface_hub.snapshot_download`` (the commit of a repository, its list of files, and each
file or a range of its bytes, at ``main`` or at the commit) and of ``HfApi.create_repo`` and ``create_commit``
(validation of the card, the upload mode of each file, and commits to ``main`` that add or replace files).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import pytest
import yaml

Failure = Literal["none", "unauthorized", "not_found", "cut_off", "unavailable", "stalled", "refused_commit"]

_ROUTE = re.compile(
    r"/(?P<api>api/)?(?P<kind>models/|datasets/)?(?P<name>.+?)"
    r"(/(?P<action>revision|tree|resolve|preupload|commit)/(?P<revision>[^/]+)(/(?P<file>.+))?)?"
)


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Use the hub at a URL in this process and in processes that it starts."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def _list_files(folder: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return a commit hash computed from names and contents of the files, and the tree entries by path."""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        entries[name] = {"type": "file", "path": name, "size": len(content), "oid": oid}
    return hashlib.sha1(json.dumps(entries).encode(), usedforsecurity=False).hexdigest(), entries


class _Handler(BaseHTTPRequestHandler):
    """Handler that serves one request and closes the connection."""

    hub: StandInHub
    body = b""

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Do not log to stderr."""

    def do_GET(self) -> None:
        hub, failure = self.hub, self.hub.failure
        hub.requests.append(f"{self.command} {self.path}")
        if failure == "stalled":
            hub.stopping.wait()
            self.close_connection = True
        elif failure == "unavailable":
            self._send(503, {"error": "Service Unavailable"})
        elif failure == "unauthorized":
            self._error(401, "RepoNotFound", "Invalid username or password.")
        elif failure == "not_found":
            self._error(404, "RepoNotFound", "Repository not found")
        elif self.path in ("/api/repos/create", "/api/validate-yaml"):
            self._serve_account()
        else:
            self._serve_repository()

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))  # otherwise the connection is reset
        self.do_GET()

    def _serve_repository(self) -> None:
        hub, (path, separator, query) = self.hub, self.path.partition("?")
        route = _ROUTE.fullmatch(path)
        name = (route["kind"] or "models/") + route["name"] if route else ""
        if route and name in hub.aliases:
            canonical = hub.aliases[name].partition("/")[2]
            target = path[: route.start("name")] + canonical + path[route.end("name") :] + separator + query
            return self._send(307, {"error": f"Redirecting to {target}"}, {"Location": target})
        if not route or name not in hub.repos:
            return self._error(404, "RepoNotFound", "Repository not found")
        commit, entries = _list_files(hub.repos[name])
        action, file = (route["api"] or "") + (route["action"] or "revision"), unquote(route["file"] or "")
        if unquote(route["revision"] or "main") not in ("main", commit):
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {route['revision']}")
        if self.command == "POST":
            return self._serve_upload(name, action)
        if action == "resolve" and file in entries:
            headers = {"X-Repo-Commit": commit, "ETag": f'"{entries[file]["oid"]}"', "Accept-Ranges": "bytes"}
            return self._send_file(hub.repos[name] / file, headers)
        if action == "api/tree":
            return self._send(200, list(entries.values()))
        if action == "api/revision":
            files = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in entries.values()]
            info = {"id": name.partition("/")[2], "sha": commit, "private": hub.private.get(name), "siblings": files}
            return self._send(200, info)
        return self._error(404, "EntryNotFound", "Entry not found")

    def _serve_account(self) -> None:
        """Create a repository, or validate the metadata of a card; the real hub validates more."""
        hub, request = self.hub, json.loads(self.body)
        if self.path.endswith("validate-yaml"):
            errors, metadata = [], re.match(r"---\n(.*?)^---$", request["content"], re.DOTALL | re.MULTILINE)
            try:
                yaml.safe_load(metadata[1]) if metadata else None
            except yaml.YAMLError as error:
                errors = [{"message": str(error)}]
            self._send(400 if errors else 200, {"errors": errors, "warnings": []})
        elif self._has_token():
            address = f"{request['organization']}/{request['name']}"
            name, created = f"models/{address}", {"url": f"{hub.endpoint}/{address}", "name": address}
            if name in hub.repos:
                self._error(409, "", "You already created this model repo", created)
            else:
                assert hub.uploads is not None, "this hub accepts no uploads"
                hub.repos[name] = hub.uploads / address
                hub.repos[name].mkdir(parents=True)
                # The field differs between versions of huggingface_hub.
                hub.private[name] = bool(request.get("private")) or request.get("visibility") == "private"
                self._send(200, created)

    def _serve_upload(self, name: str, action: str) -> None:
        """Return the upload mode of each file, or apply a commit."""
        hub = self.hub
        if not self._has_token():
            return
        if action == "api/preupload":
            answer = {"uploadMode": "regular", "shouldIgnore": False}
            self._send(200, {"files": [{"path": f["path"], **answer} for f in json.loads(self.body)["files"]]})
        elif hub.failure == "refused_commit":
            self._error(403, "", "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        else:
            header, *files = (json.loads(line)["value"] for line in self.body.splitlines())
            for file in files:
                target = hub.repos[name] / file["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(file["content"]))
            hub.commits.append(header["summary"])
            commit, _ = _list_files(hub.repos[name])
            url = f"{hub.endpoint}/{name.removeprefix('models/')}/commit/{commit}"
            self._send(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _has_token(self) -> bool:
        """Whether the request has the required token; otherwise, send an error response."""
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self._error(401, "", "Invalid credentials in Authorization header")
        return False

    def _send_file(self, path: Path, headers: dict[str, str]) -> None:
        body, status, start, n_sent = path.read_bytes(), 200, 0, None
        size = len(body)
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested and int(requested[1]) < size:
            start, stop = int(requested[1]), int(requested[2] or size) + 1
            status, body = 206, body[start:stop]
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{size}"
        if self.hub.failure == "cut_off" and size > 1024:  # no request gets beyond the middle of the file
            n_sent = min(len(body) // 2, max(0, size // 2 - start))
        self._send(status, body, headers, n_sent)

    def _error(self, status: int, code: str, message: str, fields: Mapping[str, str] | None = None) -> None:
        """Send an error like the hub: the message in a header and as JSON, and the code, if any, in a header."""
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, {"error": message, **(fields or {})}, headers)

    def _send(self, status: int, body: object, headers: Any = None, n_sent: int | None = None) -> None:
        """Send bytes, or other values as JSON; ``n_sent`` cuts the body off after this number of bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:n_sent])


class StandInHub:
    """Context manager that serves folders as hub repositories on a local port.

    Attributes:
        repos: Folders by "models/OWNER/NAME" or "datasets/OWNER/NAME". They are read again for each request.
        aliases: Names in ``repos`` that other names redirect to, as the hub does for "datasets/ag_news".
        uploads: Folder for new repositories, which are added to ``repos``.
        token: Token that uploads require. Downloads never require one.
        private: Whether a new repository was requested as private, by its name in ``repos``.
        commits: First lines of the commit messages.
        failure: How requests fail: "cut_off" in the middle of each file of more than 1,024 bytes, "stalled" without a
            response until the hub is closed, "refused_commit" at a commit but not before.
        requests: Requests as "GET /api/models/...", including the query.
    """

    endpoint: str

    def __init__(
        self, repos: Mapping[str, Path], aliases: Mapping[str, str] | None = None, uploads: Path | None = None
    ) -> None:
        self.repos, self.aliases, self.uploads = dict(repos), dict(aliases or {}), uploads
        self.token = "hf_right"
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.failure: Failure = "none"
        self.requests: list[str] = []
        self.stopping = threading.Event()

    def __enter__(self) -> StandInHub:
        """Start the server."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign] # ignore closed connections
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop the server; stalled requests end without a response."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
