"""Download from and upload to the model hub."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, get_session, snapshot_download
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from setfit_kd.config.presets import OFFLINE_COMMAND
from setfit_kd.errors import InputError, SetFitKDError, UnavailableError, error_chain
from setfit_kd.utils.atomic_io import raise_output_errors

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, UPLOAD_TIMEOUT_S = 5.0, 10.0, 60.0
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.pkl")
_NEEDED_FILES = {  # files of a complete copy; other programs may have downloaded single files to the cache
    "model": (r"config\.json", r".*\.(safetensors|bin)", r"(.*/)?(tokenizer|vocab|sentencepiece)[^/]*"),
    "dataset": (r"(.*/)?(?!dataset_infos?\.json)[^/]+\.(?!md$)\w+",),
}
_MODEL_PREFIXES = re.compile(r"((transformer|blank):|(layers|static)(:[^@]*)?@)*")


def display_endpoint() -> str:
    """Return the hub's URL without user name and password, for display."""
    return _remove_credentials(constants.ENDPOINT)


def _remove_credentials(text: str) -> str:
    credentials = re.search(r"//(.*@)", constants.ENDPOINT)
    return text.replace(credentials[1], "") if credentials else text


def cached_revisions(models: Iterable[str | None], sources: Iterable[object]) -> dict[str, str]:
    """Return the cached commits by the names on the hub, with ``datasets/`` before data sets; skip local paths etc."""
    names: list[tuple[str, Kind]] = [(_MODEL_PREFIXES.sub("", name, count=1), "model") for name in models if name]
    names += [(re.split(r"[:\[]", source)[0], "dataset") for source in sources if isinstance(source, str)]
    commits = {}
    for name, kind in names:
        with suppress(errors.HFValidationError, errors.LocalEntryNotFoundError):
            if not Path(name).exists():
                key = name if kind == "model" else f"datasets/{name}"
                commits[key] = _download(name, kind, local_files_only=True).name
    return commits


def snapshot(name: str, kind: Kind) -> Path:
    """Return the folder of a hub repository in the local cache; download it, or complete an interrupted download.

    If the hub cannot be reached, a complete copy in the cache is used.

    Args:
        name: ``owner/name``, or the name of a canonical repository, optionally followed by ``@revision``.
        kind: Type of the repository.

    Raises:
        UnavailableError: If the hub cannot be reached or fails, and the cache holds no complete copy.
        InputError: If the repository or revision does not exist or is not accessible.
        OutputError: If the cache cannot be written.
    """
    repository, _, revision = name.partition("@")
    if name.endswith("@"):
        raise InputError(f"Expected a revision after the @, got {name!r}.", hint="Use NAME@REVISION or NAME.")
    try:
        validate_repo_id(repository)
    except errors.HFValidationError:
        raise InputError(f"{name!r} is not a local path or a valid hub name.", hint="Check the name.") from None
    failure: Exception | None = None
    if not constants.HF_HUB_OFFLINE:
        try:
            # This call fails fast: unlike the download, it has a timeout and is not retried.
            api, pinned = HfApi(endpoint=constants.ENDPOINT), revision or None
            info = api.repo_info(repository, revision=pinned, repo_type=kind, timeout=CONNECT_TIMEOUT_S)
            files = [file.rfilename for file in getattr(info, "siblings", None) or ()]
            old_weights = () if any(file.endswith(".safetensors") for file in files) else ("pytorch_model.bin",)
            with _limit_requests(REQUEST_TIMEOUT_S):
                return _download(name, kind, *old_weights)
        except Exception as error:
            if not _is_hub_error(error):
                cache = Path(constants.HF_HUB_CACHE)
                with raise_output_errors(cache, alternative="set HF_HOME to another folder for the hub's cache"):
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
    try:
        folder = _download(name, kind, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        return None
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    is_complete = all(any(re.fullmatch(pattern, file) for file in files) for pattern in _NEEDED_FILES[kind])
    return folder if is_complete else None


def _download(name: str, kind: Kind, *more_files: str, local_files_only: bool = False) -> Path:
    repository, _, revision = name.partition("@")
    settings: dict[str, Any] = {"endpoint": constants.ENDPOINT, "cache_dir": constants.HF_HUB_CACHE}
    if kind == "model":
        settings |= {"allow_patterns": [*_MODEL_FILES, *more_files], "ignore_patterns": ["onnx/*", "openvino/*"]}
    settings |= {"repo_type": kind, "revision": revision or None, "local_files_only": local_files_only}
    return Path(snapshot_download(repository, **settings))


def upload(name: str, files: Mapping[str, Path | bytes], *, message: str, private: bool | None = None) -> None:
    """Upload files to a model repository on the hub in one commit; create it if needed.

    Args:
        name: ``owner/name``.
        files: Files or their contents by path in the repository.
        message: Commit message.
        private: Whether a new repository is private; None uses the owner's settings.

    Raises:
        UnavailableError: If the hub cannot be reached or fails. No commit was reported.
        InputError: If the upload is rejected, or the repository is public although ``private`` is set.
    """
    if constants.HF_HUB_OFFLINE:
        raise UnavailableError(f"Cannot upload {name!r}: {_format_reason(None)}.", hint="Unset HF_HUB_OFFLINE.")
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    hub = HfApi(endpoint=constants.ENDPOINT)
    try:
        with _limit_requests(UPLOAD_TIMEOUT_S):
            with suppress(errors.RepositoryNotFoundError):
                if private and not hub.repo_info(name, timeout=CONNECT_TIMEOUT_S).private:
                    hint = "Make it private on the hub, or choose another name."
                    raise InputError(f"{name!r} already exists and is public.", hint=hint)
            hub.create_repo(name, private=private, exist_ok=True)
            hub.create_commit(name, operations=operations, commit_message=message)
    except Exception as error:
        if not _http_status(error) and not _is_hub_error(error):  # a model card is rejected with a ValueError
            raise
        raise _upload_error(error, name) from error


@contextmanager
def _limit_requests(timeout_s: float) -> Iterator[None]:
    """Limit requests to ``timeout_s`` and one retry, or five for downloads; huggingface_hub has no setting for this."""
    requests: Counter[tuple[str, str]] = Counter()

    def limit(request: Any) -> None:
        key = (request.method, str(request.url))
        requests[key] += 1
        if requests[key] > (6 if request.method == "GET" and "/resolve/" in key[1] else 2):
            raise errors.OfflineModeIsEnabled(f"gave up on {request.url}")
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)

    client = get_session()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "request": [*hooks.get("request", []), limit]}
    try:
        yield
    finally:
        client.event_hooks = hooks


def _http_status(error: BaseException | None) -> int:
    """Return the HTTP status of an error or of its causes, or 0."""
    statuses = (getattr(getattr(cause, "response", None), "status_code", 0) for cause in error_chain(error))
    return next(filter(None, statuses), 0)


def _is_hub_error(error: Exception) -> bool:
    """Whether an error comes from the hub or from the connection to it, by httpx or, in newer versions, httpx2."""
    is_http_error = type(error).__module__.startswith("httpx")
    return is_http_error or isinstance(error, errors.HfHubHTTPError | errors.LocalEntryNotFoundError | ConnectionError)


def _format_reason(error: Exception | None, transfer: str = "download from") -> str:
    """Return the reason of a failure as a clause; None stands for offline mode."""
    if error is None:
        return "HF_HUB_OFFLINE is set"
    kind, hub = type(error).__name__, f"the hub at {display_endpoint()}"
    if (status := _http_status(error)) >= 400:
        return f"{hub} returned HTTP {status}"
    if kind in ("ConnectError", "ConnectTimeout"):
        return f"cannot connect to {hub} ({_remove_credentials(str(error))})"
    return f"{hub} timed out" if "Timeout" in kind else f"the {transfer} {display_endpoint()} was interrupted ({kind})"


def _download_error(error: Exception | None, name: str, kind: Kind) -> SetFitKDError:
    label, hub = f"The {'data set' if kind == 'dataset' else 'model'} {name!r}", f"the hub at {display_endpoint()}"
    status = _http_status(error)
    if status in (401, 403):
        message = f"{label} is not a local path, and it does not exist on {hub} or requires a login (HTTP {status})."
        hint = "Check the name. If it is private or gated, log in with `hf auth login` or set HF_TOKEN."
        return InputError(message, hint=hint)
    if isinstance(error, errors.RevisionNotFoundError):
        repository, _, revision = name.partition("@")
        message = f"{repository!r} on {hub} has no revision {revision!r}."
        return InputError(message, hint="Use a branch, a tag or a commit.")
    if status == 404:
        message = f"{label} is not a local path and does not exist on {hub} (HTTP 404)."
        return InputError(message, hint="Check the name.")
    reason = _format_reason(error)
    hint = f"Check the name. An example that works without the hub: {OFFLINE_COMMAND}"
    if "was interrupted" in reason:
        hint = "Run the same command again. Downloaded files are kept."
    return UnavailableError(f"{label} is neither a local path nor in the local cache: {reason}.", hint=hint)


def _upload_error(error: Exception, name: str) -> SetFitKDError:
    status = _http_status(error)
    if status in (401, 403, 404):
        message = f"No permission to write to {name!r}: the hub at {display_endpoint()} returned HTTP {status}."
        hint = "Log in with a write token (`hf auth login` or HF_TOKEN), and check the owner's name."
        return InputError(message, hint=hint)
    if 400 <= status < 500 and status not in (408, 412, 429):  # timeout, concurrent commit, too many requests
        reason = " ".join(_remove_credentials(str(getattr(error, "server_message", None) or error)).split())
        message = f"The hub at {display_endpoint()} rejected the upload (HTTP {status}): {reason}"
        return InputError(message, hint="No file was committed. Fix the problem and push again.")
    message = f"Cannot upload {name!r}: {_format_reason(error, 'upload to')}."
    return UnavailableError(message, hint="No file was committed. Try again.")
