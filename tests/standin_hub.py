"""A small stand-in for the Hugging Face hub on loopback, for tests that must not need the internet.

It answers the routes that ``huggingface_hub.snapshot_download`` uses: a repository's commit, its files (always
recursive, in one page), and each file or a range of its bytes, at ``main`` or at the commit. No file is said to be
in LFS or Xet storage, so all of them go over plain HTTP.

It also answers what ``HfApi.create_repo``, ``create_commit`` and ``upload_folder`` ask: a new repository, a look at its
card, how each file is to come (always within the commit), and commits to ``main`` that add, replace or delete files.
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


def _complaints(card: str) -> dict[str, list[dict[str, str]]]:
    """What the hub finds wrong with the metadata at the top of a README.md; it looks at far more than this."""
    errors, metadata = [], re.match(r"---\r?\n(.*?)^---\s*$", card, re.DOTALL | re.MULTILINE)
    try:
        known = yaml.safe_load(metadata[1]) if metadata else None
    except yaml.YAMLError as error:
        errors, known = [{"message": str(error)}], {}
    missing = {"message": "empty or missing yaml metadata in repo card"}
    return {"errors": errors, "warnings": [missing] if known is None else []}


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
    body = b""

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
            self._ask_for_login()
        else:
            self._route(server.hub)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))  # unread, it would reset the connection
        self.do_GET()

    def _route(self, hub: StandInHub) -> None:
        path, mark, query = self.path.partition("?")
        route = _ROUTE.fullmatch(path)
        name = (route["kind"] or "models/") + route["name"] if route else ""
        if hub.failure != "not_found" and f"{self.command} {path}" in _ACCOUNT_ROUTES:
            self._serve_account(hub, path)
        elif hub.failure == "not_found" or route is None or name not in {**hub.repos, **hub.aliases}:
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
            elif self.command == "POST" and action in ("api/preupload", "api/commit") and not file:
                self._take(hub, name, action)
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
        """Answer what is not about a repository that is already there."""
        asked = json.loads(self.body or b"{}")
        if path.endswith("validate-yaml"):
            found = _complaints(asked["content"])
            self._send(400 if found["errors"] else 200, found, {})
        elif not self._has_token(hub):
            pass
        elif path.endswith("whoami-v2"):
            self._send(200, {"type": "user", "name": _USER, "orgs": []}, {})
        else:
            kind, owner = asked.get("type") or "model", asked.get("organization") or _USER
            name = f"{kind}s/{owner}/{asked['name']}"
            address = name.removeprefix("models/")
            made = {"url": f"{hub.endpoint}/{address}", "name": f"{owner}/{asked['name']}"}
            if hub.uploads is None:
                self._error(403, "", f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
            elif name in {**hub.repos, **hub.aliases}:
                self._error(409, "", f"You already created this {kind} repo", made)
            else:
                hub.repos[name] = hub.uploads / address
                hub.repos[name].mkdir(parents=True, exist_ok=True)
                # The field was renamed from one version of huggingface_hub to another.
                hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
                self._send(200, made, {})

    def _take(self, hub: StandInHub, name: str, action: str) -> None:
        """Say how each file is to come, or take a commit, whole or not at all."""
        commit, entries = _listing(hub.repos[name])
        if not self._has_token(hub):
            return
        # What was not created here is somebody else's, such as a folder that several tests share.
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
                self._error(400, "", f"The stand-in takes no {key}")
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
        _blob_id.cache_clear()  # two commits may be closer together than the file system's clock tells apart
        hub.commits.append(header["value"]["summary"])
        commit, _ = _listing(hub.repos[name])
        url = f"{hub.endpoint}/{name.removeprefix('models/')}/commit/{commit}"
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": url}, {})

    def _has_token(self, hub: StandInHub) -> bool:
        """Whether the request brings the token that the hub asks for, if any; where it does not, it is answered."""
        given = self.headers.get("Authorization")
        if hub.token is None or given == f"Bearer {hub.token}":
            return True
        if given is None:
            self._ask_for_login()
        else:
            self._error(401, "", "Invalid credentials in Authorization header")
        return False

    def _ask_for_login(self) -> None:
        """Refuse a request without a token; about a repository, this does not say whether there is one."""
        # huggingface.co may leave out the code, but huggingface_hub guesses it from https addresses only.
        about_repository = f"{self.command} {self.path.partition('?')[0]}" not in _ACCOUNT_ROUTES
        self._error(401, "RepoNotFound" if about_repository else "", "Invalid username or password.")

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

    def _error(self, status: int, code: str, message: str, more: Mapping[str, str] | None = None) -> None:
        """Fail in the hub's manner, which tells the reason in headers, the code not always, and as JSON."""
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, {"error": message, **(more or {})}, headers)

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
    without any answer until the hub is closed; "refused_commit" at a commit and not before it.
    ``requests`` has the lines "GET /api/models/...", query included.

    With a folder ``uploads``, repositories can be created: "OWNER/NAME" becomes a folder in it and joins ``repos``; a
    name without an owner is put under "me". ``private`` says of each under its name in ``repos`` how it was asked for,
    which changes nothing about downloads, and ``commits`` has the first lines of the commit messages. ``token``, where
    it is set, is asked for by uploads, never by downloads.
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
