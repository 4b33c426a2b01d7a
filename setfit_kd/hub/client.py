"""The one door to the hub: what is asked for comes whole, or an error says what stood in the way."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

from setfit_kd.config import OFFLINE_COMMAND
from setfit_kd.errors import InputError, SetFitKDError, UnavailableError, error_chain
from setfit_kd.utils.atomic_io import write_errors

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
CONTACT_S = 5.0
STALL_S = 10.0
UPLOAD_STALL_S = 60.0
_MODEL_FILES: dict[str, Any] = {
    "allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.model", "*.pkl"],
    "ignore_patterns": ["onnx/*", "openvino/*"],
}


_PASSING = (408, 412, 429)
"""HTTP statuses of refusals that pass: too slow, a commit of somebody else's in between, too many requests."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_revisions: ContextVar[dict[str, str] | None] = ContextVar("revisions", default=None)


@contextmanager
def revisions() -> Iterator[dict[str, str]]:
    """Within this block, gather the commit of every repository that `snapshot` hands out.

    It is kept by the name asked for, that of a data set with ``datasets/`` before it.
    """
    found: dict[str, str] = {}
    token = _revisions.set(found)
    try:
        yield found
    finally:
        _revisions.reset(token)


def endpoint() -> str:
    """The hub's address: ``HF_ENDPOINT``, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def address() -> str:
    """The hub's address as it may be shown: without a name and password in it."""
    return without_password(endpoint())


def without_password(text: str) -> str:
    """A text in which the hub's address, wherever it stands, has no name and password in it."""
    secret = re.search(r"//(.*@)", endpoint())
    return text.replace(secret[1], "") if secret else text


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` asks to stay off the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def is_reachable(timeout_s: float = 3.0) -> bool:
    """Whether anything answers at the hub's address within ``timeout_s`` seconds."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    if is_offline():
        return False
    try:
        with urlopen(Request(address(), method="HEAD"), timeout=timeout_s):
            return True
    except HTTPError:
        return True
    except (URLError, OSError, ValueError):
        return False


def is_name(name: str) -> bool:
    """Whether this may be ``owner/name`` of a repository."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None


def split_revision(name: str) -> tuple[str, str | None]:
    """``owner/name@revision`` to its two parts; a revision is a branch, a tag or a commit."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def snapshot(name: str, kind: Kind) -> Path:
    """The folder of a hub repository in the local cache, downloaded where it is not there yet.

    A copy that an earlier run left whole is used when the hub cannot be reached; one cut off half-way never is: it is
    taken up again the next time.

    Args:
        name: ``owner/name``, or the short name of a canonical data set; with ``@revision`` of that revision.
        kind: What the repository holds.

    Raises:
        UnavailableError: The hub cannot be reached, fails, or breaks off, and there is no whole copy here.
        InputError: There is no such repository or revision, or it may not be read.
        OutputError: The cache cannot be written.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        folder = _snapshot(name, kind)
    except HFValidationError:
        raise InputError(f"{name!r} is neither a file or folder here nor a hub name.", hint="Check it.") from None
    gathered = _revisions.get()
    if gathered is not None and _COMMIT.fullmatch(folder.name):
        gathered[name if kind == "model" else f"datasets/{name}"] = folder.name
    return folder


def _snapshot(name: str, kind: Kind) -> Path:
    from huggingface_hub import HfApi

    repository, revision = split_revision(name)
    if name.endswith("@"):
        raise InputError(f"{name!r} names no revision.", hint="Write NAME@REVISION, or NAME alone.")
    failure: Exception | None = None
    if not is_offline():
        with write_errors(_cache(), elsewhere="let HF_HOME name another folder for the hub's cache"):
            try:
                # Asked first, since this call alone takes a time limit and is not repeated.
                HfApi(endpoint=endpoint()).repo_info(repository, revision=revision, repo_type=kind, timeout=CONTACT_S)
                with _bounded_requests():
                    folder = _fetch(name, kind)
                    if kind == "dataset" or any(folder.rglob("*.safetensors")):
                        return folder
                    return _fetch(name, kind, allow_patterns=[*_MODEL_FILES["allow_patterns"], "pytorch_model.bin"])
            except Exception as error:
                if not _is_the_hubs(error):
                    raise
                failure = error
    cached = cached_snapshot(name, kind)
    if cached is None:
        raise _explain(failure, name, kind) from failure
    if failure is not None:
        logger.warning("%s is taken from the local cache: %s.", name, _reason(failure))
    return cached


def cached_snapshot(name: str, kind: Kind) -> Path | None:
    """The folder of a whole copy of a repository in the local cache, or None; asks nobody."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _fetch(name, kind, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    # A cache that other programs filled file by file says nothing of what is missing.
    files = [path for path in folder.rglob("*") if path.is_file()]
    if kind == "dataset":
        about = ("dataset_info.json", "dataset_infos.json")
        return folder if any(path.suffix not in (".md", "") and path.name not in about for path in files) else None
    has_weights = any(path.suffix in (".safetensors", ".bin") for path in files)
    has_tokenizer = any(path.name.startswith(("tokenizer", "vocab", "sentencepiece")) for path in files)
    return folder if has_weights and has_tokenizer and (folder / "config.json").is_file() else None


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(os.environ.get("HF_HUB_CACHE", HF_HUB_CACHE))


def _fetch(name: str, kind: Kind, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    repository, revision = split_revision(name)
    options = {**(_MODEL_FILES if kind == "model" else {}), **options, "revision": revision}
    return Path(snapshot_download(repository, repo_type=kind, endpoint=endpoint(), cache_dir=_cache(), **options))


def upload(name: str, files: Mapping[str, Path | bytes], *, message: str, private: bool | None = None) -> str:
    """Put files into a model repository on the hub, all in one commit; the repository is made where there is none.

    Args:
        name: ``owner/name``.
        files: What to upload, by its path in the repository.
        message: What the commit is called.
        private: Whether a new repository is only for those who may see it; None leaves it to the owner's settings.

    Returns:
        The repository's address.

    Raises:
        UnavailableError: The hub cannot be reached, or fails; no file was committed, as far as it told.
        InputError: The name is none, may not be written to, or is of a public repository where ``private`` is wanted.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if is_offline():
        raise UnavailableError(f"{name!r} was not uploaded: {_reason(None)}.", hint="Unset it to upload.")
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    hub = HfApi(endpoint=endpoint())
    try:
        with _bounded_requests(UPLOAD_STALL_S):
            if private:
                with suppress(RepositoryNotFoundError):
                    if not hub.repo_info(name, timeout=CONTACT_S).private:
                        raise InputError(
                            f"{name!r} is there already, and everybody may see it.",
                            hint="Make it private on the hub, or name another.",
                        )
            hub.create_repo(name, private=private, exist_ok=True)
            hub.create_commit(name, operations=operations, commit_message=message)
    except HFValidationError as error:
        raise InputError(f"{name!r} is no name on the hub ({error}).", hint="Name it OWNER/NAME.") from error
    except Exception as error:
        if _status(error) is None and not _is_the_hubs(error):  # a card's is refused by a ValueError
            raise
        raise _explain_upload(error, name) from error
    return f"{address()}/{name}"


@contextmanager
def _bounded_requests(stall_s: float = STALL_S) -> Iterator[None]:
    """Within this block, no request to the hub waits longer than ``stall_s``, and only downloads are repeated often.

    huggingface_hub's listings have no time limit, and its repeats no setting.
    """
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    seen: Counter[tuple[str, str]] = Counter()

    def bound(request: Any) -> None:
        key = (request.method, str(request.url))
        seen[key] += 1
        if seen[key] > (6 if request.method == "GET" and "/resolve/" in str(request.url) else 2):
            raise OfflineModeIsEnabled(f"gave up on {request.url}")
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), stall_s)

    client = get_session()
    before = client.event_hooks
    client.event_hooks = {**before, "request": [*before.get("request", []), bound]}
    try:
        yield
    finally:
        client.event_hooks = before


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, looked for along its causes."""
    for link in error_chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _is_the_hubs(error: Exception) -> bool:
    """Whether an error comes from the hub or from the way to it."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError | LocalEntryNotFoundError | ConnectionError):
        return True
    # The HTTP library under huggingface_hub has changed its name from one major version to the next.
    return type(error).__module__.partition(".")[0] in {"httpx", "httpx2"}


def _reason(error: Exception | None, what: str = "download from") -> str:
    """What stood in the way, in a clause; None means that the network was not to be asked."""
    if error is None:
        return "HF_HUB_OFFLINE keeps off the hub"
    status = _status(error)
    if status is not None and status >= 400:
        return f"the hub at {address()} answers HTTP {status}"
    kind = type(error).__name__
    if kind in ("ConnectError", "ConnectTimeout"):
        return f"no hub answers at {address()} ({without_password(str(error))})"
    if "Timeout" in kind:
        return f"the hub at {address()} does not answer in time"
    return f"the {what} {address()} broke off ({kind})"


def _explain(error: Exception | None, name: str, kind: Kind) -> SetFitKDError:
    """What a failed download means to the user."""
    what = f"The {'data set' if kind == 'dataset' else 'model'} {name!r}"
    status = _status(error)
    if status in (401, 403):
        return InputError(
            f"{what} may not be read, or is not there: the hub at {address()} asks for a login (HTTP {status}).",
            hint="Check the name; if it is private or gated, log in by `hf auth login` or set HF_TOKEN.",
        )
    if status == 404 and "@" in name and type(error).__name__ == "RevisionNotFoundError":
        repository, revision = split_revision(name)
        return InputError(
            f"{repository!r} on the hub at {address()} has no revision {revision!r}.",
            hint="Name a branch, a tag or a commit.",
        )
    if status == 404:
        return InputError(f"{what} is neither here nor on the hub at {address()} (HTTP 404).", hint="Check the name.")
    reason = _reason(error)
    hint = f"Without the hub, this works: {OFFLINE_COMMAND}"
    if "broke off" in reason:
        hint = "Run the same command again; what was already whole is kept."
    return UnavailableError(f"{what} is neither a file or folder here nor in the local cache, and {reason}.", hint=hint)


def _explain_upload(error: Exception, name: str) -> SetFitKDError:
    """What a failed upload means to the user."""
    status = _status(error)
    if status in (401, 403, 404):
        return InputError(
            f"{name!r} may not be written to: the hub at {address()} answers HTTP {status}.",
            hint="Log in with a token that may write, by `hf auth login` or HF_TOKEN, and check the owner's name.",
        )
    if status is not None and 400 <= status < 500 and status not in _PASSING:
        told = " ".join(without_password(str(getattr(error, "server_message", None) or error)).split())
        return InputError(
            f"The hub at {address()} refuses the upload (HTTP {status}): {told}",
            hint="Mend what it names and push again; no file was committed.",
        )
    return UnavailableError(
        f"{name!r} was not uploaded: {_reason(error, 'upload to')}.", hint="No file was committed. Try again."
    )
