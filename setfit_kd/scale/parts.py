"""Divide files into parts, and write the predictions of each part to a separate output."""

from __future__ import annotations

import json
import logging
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import IO, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from setfit_kd.data.readers import Record, file_format, read_records
from setfit_kd.data.sources import stream_file
from setfit_kd.errors import ConfigError, DataError, SetFitKDError, first_line
from setfit_kd.inference.classifier import TorchClassifier, check_pair_column, is_bundle, open_classifier
from setfit_kd.inference.predict import classify, write_predictions
from setfit_kd.models.io import classifier_folder
from setfit_kd.runtime.classify import Classifier
from setfit_kd.utils.atomic_io import TEMPORARY_NAME, atomic_file, raise_output_errors
from setfit_kd.utils.console import track
from setfit_kd.utils.files import file_hash, fingerprint

logger = logging.getLogger(__name__)
_THREADS = 32  # that read metadata and manifests
ROWS_PER_PART = 100_000  # of a Parquet file with several row groups
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")  # of a file, by fsspec's backends


@dataclass(frozen=True)
class Part:
    """One input file, or a range of row groups of a Parquet file."""

    input: str  # absolute path or URL, as is the output
    size: int | None  # bytes; None: unknown
    version: str  # ETag or modification time
    output: str  # its extension selects the format
    row_groups: list[int] | None = None  # None: all
    first_row: int = 1


@dataclass(frozen=True)
class Job:
    """A classifier, and the settings that change its predictions."""

    model: str
    columns: dict[str, Any]  # `text_column` and `pair_column` of `stream_rows`
    decision: dict[str, Any]  # `threshold`, `at_least_one` and `embeddings` of `classify`
    options: dict[str, Any]  # of `open_classifier`
    fingerprint: str  # of the files of the model

    @classmethod
    def of(cls, model: str, columns: dict[str, Any], decision: dict[str, Any], options: dict[str, Any]) -> Job:
        """Create a job; raise a `ModelError` if there is no such model."""
        folder = Path(model) if is_bundle(model) else classifier_folder(model)
        files = [(str(f.relative_to(folder)), file_hash(f)) for f in sorted(folder.rglob("*")) if f.is_file()]
        model = str(Path(model).absolute()) if Path(model).exists() else model
        return cls(model, columns, decision, options, fingerprint(files))

    def manifest(self, part: Part) -> Any:
        """Return the entries of the manifest of a part for its input, the model and the settings."""
        settings = {**self.columns, **self.decision, "exact": self.options["exact"]}
        fields = {name: value for name, value in asdict(part).items() if name != "output"}
        return json.loads(json.dumps({**fields, "model": self.fingerprint, "settings": settings}))

    def open_classifier(self, **options: Any) -> TorchClassifier | Classifier:
        """Open the classifier; raise a `ConfigError` if it does not fit the settings."""
        classifier = open_classifier(self.model, **{**self.options, **options})
        check_pair_column(self.model, classifier, self.columns["pair_column"])
        next(classify(classifier, [], **self.decision), None)
        return classifier


@dataclass(frozen=True)
class Result:
    """Number of rows of the output of a part, or why it has none."""

    part: Part
    rows: int = 0
    error: str | None = None


def list_parts(inputs: Iterable[str], folder: str) -> list[Part]:
    """List the parts of files, in the order of their names.

    Args:
        inputs: Paths, URLs or patterns such as ``s3://bucket/*.parquet``, for fsspec.
        folder: Path or URL of the folder of the outputs, which have the paths of the files below their common folder.

    Raises:
        ConfigError: If two files have the same output, or a file is in the folder of the outputs.
        DataError: If there is no such file, or its file system is not available.
    """
    files: dict[str, Any] = {}
    for name in inputs:
        try:
            (fs, path), (output_fs, root) = url_to_fs(name), url_to_fs(folder)
            infos = {path: fs.info(path)} if fs.isfile(path) else fs.glob(path, detail=True)
        except Exception as error:  # each backend has errors of its own
            hint = "Check the URLs and your access to them. fsspec may need a package, such as s3fs for s3://."
            message = f"Cannot list {name}, or write to {folder} ({first_line(str(error)).rstrip('.')})."
            raise DataError(message, hint=hint) from None
        infos = {path: info for path, info in infos.items() if info["type"] == "file"}
        if not infos:
            raise DataError(f"No such file: {name}.", hint="Check the path. For a folder, pass FOLDER/*.EXTENSION.")
        files |= {fs.unstrip_protocol(path): (fs, path, info) for path, info in infos.items()}
    root = root if isinstance(output_fs, LocalFileSystem) else output_fs.unstrip_protocol(root)
    common = os.path.commonpath([posixpath.dirname(url) for url in files]) or "."
    parts: dict[str, Part] = {}
    urls = sorted(files)
    with ThreadPoolExecutor(_THREADS) as pool:
        ranges = pool.map(_row_groups, *zip(*(files[url][:2] for url in urls), strict=True))
    for url, groups in zip(urls, ranges, strict=True):
        fs, path, info = files[url]
        source = path if isinstance(fs, LocalFileSystem) else url
        if source.startswith(root.rstrip("/") + "/"):
            raise ConfigError(f"{source} is in the folder of the outputs.", hint="Choose another --output.")
        name = posixpath.relpath(url, common)
        stem, _ = posixpath.splitext(name[:-3] if name.lower().endswith(".gz") else name)
        version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
        extension = ".parquet" if file_format(Path(path)) == ".parquet" else ".jsonl"
        for suffix, row_groups, first_row in groups:
            output = posixpath.join(root, f"{stem}{suffix}{extension}")
            if output in parts:
                message = f"{parts[output].input} and {source} have the same output: {output}."
                raise ConfigError(message, hint="Rename one of them, or use two commands with different --output.")
            parts[output] = Part(source, info.get("size"), version, output, row_groups, first_row)
    return list(parts.values())


def _row_groups(fs: Any, path: str) -> list[tuple[str, list[int] | None, int]]:
    """Return the suffix of the name, the row groups (None: all) and the first row of each part of a file."""
    if file_format(Path(path)) != ".parquet":
        return [("", None, 1)]
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path, filesystem=fs)
    except (pa.ArrowException, OSError):
        return [("", None, 1)]  # reported when the part is read
    ends = [0, *accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))]
    ranges = [list(part) for _, part in groupby(range(len(ends) - 1), lambda group: ends[group] // ROWS_PER_PART)]
    if len(ranges) < 2:
        return [("", None, 1)]
    bounds = [(ends[part[0]] + 1, ends[part[-1] + 1]) for part in ranges]
    width = len(str(ends[-1]))
    return [(f".rows-{a:0{width}}-{b:0{width}}", part, a) for part, (a, b) in zip(ranges, bounds, strict=True)]


def predict_parts(
    parts: Sequence[Part], job: Job, *, engine: str | None = None, workers: int | None = None
) -> list[Result]:
    """Classify the parts whose output is not complete, and return their results; each error is also logged.

    ``engine`` is ``ray`` or None for this process; ``workers`` is as in `run_with_ray`.

    Raises:
        SetFitKDError: If the classifier cannot be opened or does not fit the settings, or if Ray fails.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        manifests = list(pool.map(partial(read_manifest, job=job), parts))
    pending = [part for part, manifest in zip(parts, manifests, strict=True) if manifest is None]
    outputs = {part.output for part in parts}
    for folder in {Path(output).parent for output in outputs}:  # on a remote file system, there are no such files
        for file in folder.glob(".*"):  # temporary files of killed processes
            if TEMPORARY_NAME.fullmatch(file.name) and str(folder / file.stem[1:]) in outputs:
                file.unlink(missing_ok=True)
    if not pending:
        return []
    results: Iterable[Result]
    if engine:
        from setfit_kd.scale.ray_engine import run_with_ray

        results = run_with_ray(pending, job, workers)
    else:
        results = map(partial(run_part, job=job, classifier=job.open_classifier()), pending)
    finished = []
    with track("Classifying", len(pending), "files") as advance:
        for result in results:
            finished.append(result)
            if result.error:
                logger.error("%s", result.error)
            advance(1)
    return finished


def read_manifest(part: Part, job: Job) -> dict[str, Any] | None:
    """Return the manifest of a part if its output is complete and was written by the same job."""
    fs, path = url_to_fs(part.output)
    try:
        manifest: dict[str, Any] = json.loads(fs.cat_file(f"{path}.manifest.json"))
        is_complete = manifest.items() >= job.manifest(part).items() and fs.size(path) == manifest["output_size"]
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return manifest if is_complete else None


def run_part(part: Part, job: Job, classifier: TorchClassifier | Classifier) -> Result:
    """Classify a part, unless its output is complete: write the output atomically, and then its manifest."""
    try:
        return Result(part, (read_manifest(part, job) or _write(part, job, classifier))["rows_out"])
    except SetFitKDError as error:
        message = error.message
    except Exception as error:  # each backend has errors of its own
        message = f"{type(error).__name__}: {first_line(str(error))}"
    return Result(part, error=message if part.input in message else f"{part.input}: {message}")


def _write(part: Part, job: Job, classifier: TorchClassifier | Classifier) -> dict[str, Any]:
    """Write the output and the manifest of a part; return the manifest."""
    import pyarrow.parquet as pq

    fs, path = url_to_fs(part.output)
    if fs.exists(f"{path}.manifest.json"):
        fs.rm_file(f"{path}.manifest.json")  # it must never describe another output
    counts = {"rows_in": 0, "rows_out": 0}

    def count(items: Iterable[Any], name: str, size: Callable[[Any], int]) -> Iterator[Any]:
        for item in items:
            counts[name] += size(item)
            yield item

    input_fs, input_path = url_to_fs(part.input)
    name = Path(input_path if isinstance(input_fs, LocalFileSystem) else posixpath.basename(input_path))
    with input_fs.open(input_path, "rb") as source, _replace(fs, path) as target:
        schema = pq.read_schema(source) if part.output.endswith(".parquet") else ()
        columns = {f.name: f.type for f in schema if (f.name, job.columns["text_column"]) != ("text", ("text",))}
        options: Any = {"row_groups": part.row_groups, "first_row": part.first_row} if schema else {}
        records: Iterable[Record] = read_records(name, source, **options) if part.size != 0 else ()
        records = count(records, "rows_in", lambda record: 1)
        rows = stream_file(name, records, part.input, **job.columns)
        chunks = count(classify(classifier, rows, **job.decision), "rows_out", len)
        embeddings = job.decision["embeddings"]
        write_predictions(Path(path), chunks, classifier, columns, file=target, embeddings=embeddings)
    manifest = {**job.manifest(part), **counts, "output_size": fs.size(path)}
    with _replace(fs, f"{path}.manifest.json") as target:
        target.write(json.dumps(manifest, indent=2).encode() + b"\n")
    return manifest


@contextmanager
def _replace(fs: Any, path: str) -> Iterator[IO[bytes]]:
    """Write or replace a file, which appears only if the block succeeds."""
    if not isinstance(fs, LocalFileSystem):
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        with fs.transaction, fs.open(path, "wb") as file:
            yield file
        return
    target = Path(path)
    with raise_output_errors(target, alternative="choose another --output"):
        target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target, alternative="choose another --output") as file:
        yield file
