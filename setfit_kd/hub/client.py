"""Download from and upload to the model hub."""

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

from setfit_kd.config.presets import OFFLINE_COMMAND
from setfit_kd.errors import InputError, SetFitKDError, UnavailableError, error_chain
from setfit_kd.utils.atomic_io import raise_output_errors

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 10.0
UPLOAD_TIMEOUT_S = 60.0
_MODEL_FILES: dict[str, Any] = {
    "allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.model", "*.pkl"],
    "ignore_patterns": ["onnx/*", "openvino/*"],
}
_TRANSIENT_STATUSES = (408, 412, 429)
"""Client errors that may succeed later: request timeout, concurrent commit, too many requests."""
_COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
_recorded_revisions: ContextVar[dict[str, str] | None] = ContextVar("revisions", default=None)


@contextmanager
def record_revisions() -> Iterator[dict[str, str]]:
    """Context manager that records the commit of every repository that `snapshot` returns.

    Yields:
        Commit by requested name; names of data sets are prefixed with ``datasets/``.
    """
    commits: dict[str, str] = {}
    token = _recorded_revisions.set(commits)
    try:
        yield commits
    finally:
        _recorded_revisions.reset(token)


def endpoint() -> str:
    """Return the hub's URL: ``HF_ENDPOINT``, or the public hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def display_endpoint() -> str:
    """Return the hub's URL without user name and password, for display."""
    return remove_credentials(endpoint())


def remove_credentials(text: str) -> str:
    """Remove the user name and password of the hub's URL from a text."""
    credentials = re.search(r"//(.*@)", endpoint())
    return text.replace(credentials[1], "") if credentials else text


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` is set."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def is_reachable(timeout_s: float = 3.0) -> bool:
    """Whether the hub responds within ``timeout_s`` seconds."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    if is_offline():
        return False
    try:
        with urlopen(Request(display_endpoint(), method="HEAD"), timeout=timeout_s):
            return True
    except HTTPError:
        return True
    except (URLError, OSError, ValueError):
        return False


def is_repo_id(name: str) -> bool:
    """Whether a name has the form ``owner/name`` of a hub repository."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None


def split_revision(name: str) -> tuple[str, str | None]:
    """Split ``owner/name@revision`` into its two parts; a revision is a branch, a tag or a commit."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def snapshot(name: str, kind: Kind) -> Path:
    """Return the folder of a hub repository in the local cache; download it if needed.

    If the hub cannot be reached, a complete copy in the cache is used. An interrupted download is not used and is
    continued by the next call.

    Args:
        name: ``owner/name``, or the short name of a canonical data set, optionally followed by ``@revision``.
        kind: Type of the repository.

    Raises:
        UnavailableError: If the hub cannot be reached or fails, and the cache holds no complete copy.
        InputError: If the repository or revision does not exist or is not accessible.
        OutputError: If the cache cannot be written.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        folder = _snapshot(name, kind)
    except HFValidationError:
        raise InputError(f"{name!r} is not a local path or a valid hub name.", hint="Check the name.") from None
    commits = _recorded_revisions.get()
    if commits is not None and _COMMIT_HASH.fullmatch(folder.name):
        commits[name if kind == "model" else f"datasets/{name}"] = folder.name
    return folder


def _snapshot(name: str, kind: Kind) -> Path:
    from huggingface_hub import HfApi

    repository, revision = split_revision(name)
    if name.endswith("@"):
        raise InputError(f"Expected a revision after the @, got {name!r}.", hint="Use NAME@REVISION or NAME.")
    failure: Exception | None = None
    if not is_offline():
        with raise_output_errors(_cache_folder(), alternative="set HF_HOME to another folder for the hub's cache"):
            try:
                # This call fails fast: unlike the download, it has a timeout and is not retried.
                api = HfApi(endpoint=endpoint())
                api.repo_info(repository, revision=revision, repo_type=kind, timeout=CONNECT_TIMEOUT_S)
                with _limit_requests():
                    folder = _download(name, kind)
                    if kind == "dataset" or any(folder.rglob("*.safetensors")):
                        return folder
                    return _download(name, kind, allow_patterns=[*_MODEL_FILES["allow_patterns"], "pytorch_model.bin"])
            except Exception as error:
                if not _is_hub_error(error):
                    raise
                failure = error
    cached = cached_snapshot(name, kind)
    if cached is None:
        raise _download_error(failure, name, kind) from failure
    if failure is not None:
        logger.warning("Using %s from the local cache: %s.", name, _format_reason(failure))
    return cached


def cached_snapshot(name: str, kind: Kind) -> Path | None:
    """Return the folder of a complete copy of a repository in the local cache, or None, without network access."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _download(name, kind, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    # The cache does not record missing files if other programs downloaded single files.
    files = [path for path in folder.rglob("*") if path.is_file()]
    if kind == "dataset":
        metadata = ("dataset_info.json", "dataset_infos.json")
        has_data = any(path.suffix not in (".md", "") and path.name not in metadata for path in files)
        return folder if has_data else None
    has_weights = any(path.suffix in (".safetensors", ".bin") for path in files)
    has_tokenizer = any(path.name.startswith(("tokenizer", "vocab", "sentencepiece")) for path in files)
    return folder if has_weights and has_tokenizer and (folder / "config.json").is_file() else None


def _cache_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(os.environ.get("HF_HUB_CACHE", HF_HUB_CACHE))


def _download(name: str, kind: Kind, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    repository, revision = split_revision(name)
    options = {**(_MODEL_FILES if kind == "model" else {}), **options, "revision": revision}
    folder = snapshot_download(repository, repo_type=kind, endpoint=endpoint(), cache_dir=_cache_folder(), **options)
    return Path(folder)


def upload(name: str, files: Mapping[str, Path | bytes], *, message: str, private: bool | None = None) -> str:
    """Upload files to a model repository on the hub in one commit; create the repository if needed.

    Args:
        name: ``owner/name``.
        files: Files or their contents by path in the repository.
        message: Commit message.
        private: Whether a new repository is private; None uses the owner's settings.

    Returns:
        URL of the repository.

    Raises:
        UnavailableError: If the hub cannot be reached or fails. No commit was reported.
        InputError: If the name is invalid, if writing is not permitted, or if the repository is public although
            ``private`` is set.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if is_offline():
        raise UnavailableError(f"Cannot upload {name!r}: {_format_reason(None)}.", hint="Unset HF_HUB_OFFLINE.")
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    hub = HfApi(endpoint=endpoint())
    try:
        with _limit_requests(UPLOAD_TIMEOUT_S):
            if private:
                with suppress(RepositoryNotFoundError):
                    if not hub.repo_info(name, timeout=CONNECT_TIMEOUT_S).private:
                        raise InputError(
                            f"{name!r} already exists and is public.",
                            hint="Make it private on the hub, or choose another name.",
                        )
            hub.create_repo(name, private=private, exist_ok=True)
            hub.create_commit(name, operations=operations, commit_message=message)
    except HFValidationError as error:
        raise InputError(f"{name!r} is not a valid repository name ({error}).", hint="Use OWNER/NAME.") from error
    except Exception as error:
        if _http_status(error) is None and not _is_hub_error(error):  # a model card is rejected with a ValueError
            raise
        raise _upload_error(error, name) from error
    return f"{display_endpoint()}/{name}"


@contextmanager
def _limit_requests(timeout_s: float = REQUEST_TIMEOUT_S) -> Iterator[None]:
    """Context manager that limits each request to the hub to ``timeout_s`` and one retry, or five for downloads.

    huggingface_hub has no timeout for listings and no setting for its retries.
    """
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    requests: Counter[tuple[str, str]] = Counter()

    def limit(request: Any) -> None:
        key = (request.method, str(request.url))
        requests[key] += 1
        if requests[key] > (6 if request.method == "GET" and "/resolve/" in str(request.url) else 2):
            raise OfflineModeIsEnabled(f"gave up on {request.url}")
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)

    client = get_session()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "request": [*hooks.get("request", []), limit]}
    try:
        yield
    finally:
        client.event_hooks = hooks


def _http_status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error or of its causes."""
    for cause in error_chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _is_hub_error(error: Exception) -> bool:
    """Whether an error comes from the hub or from the connection to it."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError | LocalEntryNotFoundError | ConnectionError):
        return True
    # Major versions of huggingface_hub use differently named HTTP libraries.
    return type(error).__module__.partition(".")[0] in {"httpx", "httpx2"}


def _format_reason(error: Exception | None, transfer: str = "download from") -> str:
    """Return the reason of a failure as a clause; None stands for offline mode."""
    if error is None:
        return "HF_HUB_OFFLINE is set"
    status = _http_status(error)
    if status is not None and status >= 400:
        return f"the hub at {display_endpoint()} returned HTTP {status}"
    kind = type(error).__name__
    if kind in ("ConnectError", "ConnectTimeout"):
        return f"cannot connect to the hub at {display_endpoint()} ({remove_credentials(str(error))})"
    if "Timeout" in kind:
        return f"the hub at {display_endpoint()} timed out"
    return f"the {transfer} {display_endpoint()} was interrupted ({kind})"


def _download_error(error: Exception | None, name: str, kind: Kind) -> SetFitKDError:
    """Return the error to raise for a failed download."""
    label, hub = f"The {'data set' if kind == 'dataset' else 'model'} {name!r}", f"the hub at {display_endpoint()}"
    status = _http_status(error)
    if status in (401, 403):
        return InputError(
            f"{label} does not exist or requires a login: {hub} returned HTTP {status}.",
            hint="Check the name. If it is private or gated, log in with `hf auth login` or set HF_TOKEN.",
        )
    if status == 404 and "@" in name and type(error).__name__ == "RevisionNotFoundError":
        repository, revision = split_revision(name)
        return InputError(
            f"{repository!r} on {hub} has no revision {revision!r}.", hint="Use a branch, a tag or a commit."
        )
    if status == 404:
        return InputError(
            f"{label} is not a local path and does not exist on {hub} (HTTP 404).", hint="Check the name."
        )
    reason = _format_reason(error)
    hint = f"Run this command, which works without the hub: {OFFLINE_COMMAND}"
    if "was interrupted" in reason:
        hint = "Run the same command again. Downloaded files are kept."
    return UnavailableError(f"{label} is neither a local path nor in the local cache: {reason}.", hint=hint)


def _upload_error(error: Exception, name: str) -> SetFitKDError:
    """Return the error to raise for a failed upload."""
    status = _http_status(error)
    if status in (401, 403, 404):
        return InputError(
            f"No permission to write to {name!r}: the hub at {display_endpoint()} returned HTTP {status}.",
            hint="Log in with a write token (`hf auth login` or HF_TOKEN), and check the owner's name.",
        )
    if status is not None and 400 <= status < 500 and status not in _TRANSIENT_STATUSES:
        reason = " ".join(remove_credentials(str(getattr(error, "server_message", None) or error)).split())
        return InputError(
            f"The hub at {display_endpoint()} rejected the upload (HTTP {status}): {reason}",
            hint="No file was committed. Fix the problem and push again.",
        )
    return UnavailableError(
        f"Cannot upload {name!r}: {_format_reason(error, 'upload to')}.", hint="No file was committed. Try again."
    )
