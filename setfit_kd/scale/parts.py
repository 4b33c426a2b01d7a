"""Divide files into parts, and classify each part into an output of its own, unless that is complete."""

from __future__ import annotations

import glob
import json
import logging
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from setfit_kd.data.readers import Record, file_format, find_reader, read_records
from setfit_kd.data.sources import TextRow, stream_file
from setfit_kd.errors import ConfigError, DataError, SetFitKDError, first_line
from setfit_kd.inference.classifier import TorchClassifier, check_pair_column, is_bundle, open_classifier
from setfit_kd.inference.predict import Prediction, classify, write_table
from setfit_kd.models.io import classifier_folder
from setfit_kd.runtime.classify import Classifier
from setfit_kd.utils.atomic_io import atomic_file, raise_output_errors
from setfit_kd.utils.files import file_hash, fingerprint

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)
ROWS_PER_PART = 100_000  # of a Parquet file with several row groups


@dataclass(frozen=True)
class Part:
    """One input file, or a range of row groups of a Parquet file, and the output for it.

    Attributes:
        input: Absolute path or URL of the file.
        size: Its number of bytes.
        version: Its ETag, or the time of its last change.
        output: Absolute path or URL of the output, whose extension selects the format.
        row_groups: First row group, and the one after the last. [default: all]
        first_row: Number of the first row, from 1.
    """

    input: str
    size: int
    version: str
    output: str
    row_groups: tuple[int, int] | None = None
    first_row: int = 1


@dataclass(frozen=True)
class Job:
    """A classifier and the settings that change its predictions.

    Attributes:
        model: As in `open_classifier`.
        fingerprint: Hash of the model's files.
        text_column: As in `stream_rows`, as is ``pair_column``.
        threshold: As in `classify`, as are ``at_least_one`` and ``embeddings``.
        options: Other arguments of `open_classifier`; only ``exact`` counts as a setting.
    """

    model: str
    fingerprint: str
    text_column: tuple[str, ...] = ("text",)
    pair_column: tuple[str, ...] | None = None
    threshold: float | None = None
    at_least_one: bool = False
    embeddings: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str, **settings: Any) -> Job:
        """Create a job; raise a `ModelError` if there is no such model."""
        folder = Path(model) if is_bundle(model) else classifier_folder(model)
        hashes = [(str(f.relative_to(folder)), file_hash(f)) for f in sorted(folder.rglob("*")) if f.is_file()]
        return cls(str(Path(model).absolute()) if Path(model).exists() else model, fingerprint(*hashes), **settings)

    def open_classifier(self, **options: Any) -> TorchClassifier | Classifier:
        """Open the classifier; raise a `ConfigError` if it does not fit the settings."""
        classifier = open_classifier(self.model, **{**self.options, **options})
        check_pair_column(self.model, classifier, self.pair_column)
        next(self.classify(classifier, []), None)
        return classifier

    def classify(
        self, classifier: TorchClassifier | Classifier, rows: Iterable[TextRow], **options: Any
    ) -> Iterator[list[Prediction]]:
        """Classify rows, see `inference.predict.classify`."""
        settings: Any = {"threshold": self.threshold, "at_least_one": self.at_least_one, "embeddings": self.embeddings}
        return classify(classifier, rows, **settings, **options)

    def manifest(self, part: Part) -> dict[str, Any]:
        """Return the content of the manifest of a part that is known before it is classified."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("model", "options")}
        settings["exact"] = bool(self.options.get("exact"))
        content: dict[str, Any] = json.loads(json.dumps({**asdict(part), "settings": settings}))
        return content


class Result(NamedTuple):
    """Number of rows of the output of a part, or why it has none."""

    part: Part
    rows: int = 0
    error: str | None = None


def open_file_system(name: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path in it; raise a `DataError` if it is not installed."""
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(name)
    except (ImportError, ValueError) as error:
        hint = "Check the URL, and install the package that fsspec needs for it, such as s3fs for s3://."
        raise DataError(f"Cannot open {name}: {error}", hint=hint) from None
    return fs, path


def _is_local(fs: AbstractFileSystem) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


def list_parts(inputs: Iterable[str], folder: str) -> list[Part]:
    """List the parts of files, in the order of their names.

    The output of a file has its path below the common folder of all files. It is Parquet for a Parquet file, and JSON
    lines for all other formats.

    Args:
        inputs: Paths, URLs or patterns such as ``s3://bucket/*.parquet``, for fsspec.
        folder: Path or URL of the folder of the outputs.

    Raises:
        ConfigError: If two files have the same output, or a file is in the folder of the outputs.
        DataError: If there is no such file, or its format is not supported.
    """
    files: dict[str, tuple[Any, str, dict[str, Any]]] = {}
    for name in inputs:
        fs, path = open_file_system(name)
        try:
            infos = {path: fs.info(path)} if fs.isfile(path) else fs.glob(path, detail=True)
        except Exception as error:  # each backend has errors of its own
            raise DataError(f"Cannot list {name}: {error}.", hint="Check the path and your access to it.") from None
        infos = {path: info for path, info in infos.items() if info["type"] == "file"}
        if not infos:
            raise DataError(f"No such file: {name}.", hint="Check the path. For a folder, pass FOLDER/*.EXTENSION.")
        files |= {fs.unstrip_protocol(path): (fs, path, info) for path, info in infos.items()}
    output_fs, root = open_file_system(folder)
    root = root if _is_local(output_fs) else output_fs.unstrip_protocol(root)
    common = os.path.commonpath([posixpath.dirname(url) for url in files]) or "."
    parts: dict[str, Part] = {}
    for url, (fs, path, info) in sorted(files.items()):
        find_reader(Path(path))
        source = path if _is_local(fs) else url
        if source.startswith(root.rstrip("/") + "/"):
            raise ConfigError(f"{source} is in the folder of the outputs.", hint="Choose another --output.")
        name = posixpath.relpath(url, common)
        stem, _ = posixpath.splitext(name[:-3] if name.lower().endswith(".gz") else name)
        extension = ".parquet" if file_format(Path(path)) == ".parquet" else ".jsonl"
        version = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in info), "")
        groups: Any = list(_row_groups(fs, path)) if extension == ".parquet" else []
        for suffix, row_groups, first_row in groups or [("", None, 1)]:
            output = posixpath.join(root, f"{stem}{suffix}{extension}")
            if output in parts:
                message = f"{parts[output].input} and {source} have the same output: {output}."
                raise ConfigError(message, hint="Rename one of them, or use two commands with different --output.")
            parts[output] = Part(source, info["size"] or 0, str(version), output, row_groups, first_row)
    return list(parts.values())


def _row_groups(fs: AbstractFileSystem, path: str) -> Iterator[tuple[str, tuple[int, int], int]]:
    """Yield the name, the row groups and the first row of each part of a Parquet file with several parts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path, filesystem=None if _is_local(fs) else fs)
    except (pa.ArrowException, OSError):
        return  # reported when the part is read
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    start, first_row, rows, width = 0, 1, 0, len(str(metadata.num_rows))
    for stop, size in enumerate([*sizes[1:], ROWS_PER_PART], 1):
        rows += sizes[stop - 1] if sizes else 0
        if rows + size > ROWS_PER_PART and (start, stop) != (0, len(sizes)):
            yield f".rows-{first_row:0{width}}-{first_row + rows - 1:0{width}}", (start, stop), first_row
            start, first_row, rows = stop, first_row + rows, 0


def read_manifest(part: Part, job: Job) -> dict[str, Any] | None:
    """Return the manifest of a part if its output is complete and has the predictions of this job."""
    fs, path = open_file_system(part.output)
    try:
        manifest: dict[str, Any] = json.loads(fs.cat_file(f"{path}.manifest.json"))
        is_complete = manifest.items() >= job.manifest(part).items() and fs.size(path) == manifest["output_size"]
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return manifest if is_complete else None


def run_part(part: Part, job: Job, classifier: TorchClassifier | Classifier) -> Result:
    """Classify a part, unless its output is complete: write the output atomically, and then its manifest."""
    try:
        manifest = read_manifest(part, job) or _write(part, job, classifier)
    except SetFitKDError as error:
        return Result(part, error=error.message)
    except Exception as error:  # each backend has errors of its own
        logger.debug("%s failed", part.input, exc_info=True)
        return Result(part, error=f"{part.input}: {type(error).__name__}: {first_line(str(error))}")
    return Result(part, manifest["rows_out"])


def run_parts(parts: Iterable[Part], job: Job) -> Iterator[Result]:
    """Classify parts in this process, see `run_part`; raises as `Job.open_classifier`."""
    classifier = job.open_classifier()
    return (run_part(part, job, classifier) for part in parts)


def _write(part: Part, job: Job, classifier: TorchClassifier | Classifier) -> dict[str, Any]:
    """Write the output and the manifest of a part; return the manifest."""
    import pyarrow.parquet as pq

    fs, path = open_file_system(part.output)
    if fs.exists(f"{path}.manifest.json"):
        fs.rm_file(f"{path}.manifest.json")  # it must never describe another output
    input_fs, input_path = open_file_system(part.input)
    columns = {}
    if part.output.endswith(".parquet"):
        schema = pq.read_schema(input_path, filesystem=None if _is_local(input_fs) else input_fs)
        columns = {column.name: column.type for column in schema}
    if job.text_column == ("text",):
        columns.pop("text", None)
    counts = {"rows_in": 0, "rows_out": 0}

    def count(chunks: Iterable[Any], name: str, size: Callable[[Any], int]) -> Iterator[Any]:
        for chunk in chunks:
            counts[name] += size(chunk)
            yield chunk

    records = count(_read(part, input_fs, input_path), "rows_in", lambda record: 1)
    rows = stream_file(Path(input_path), records, part.input, job.text_column, job.pair_column)
    chunks = count(job.classify(classifier, rows), "rows_out", len)
    with _replace(fs, path) as file:
        write_table(file, Path(path).suffix, chunks, classifier, columns, embeddings=job.embeddings)
    manifest = {**job.manifest(part), **counts, "output_size": fs.size(path)}
    with _replace(fs, f"{path}.manifest.json") as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")
    return manifest


def _read(part: Part, fs: AbstractFileSystem, path: str) -> Iterator[Record]:
    """Yield the records of a part. A remote Parquet file is read in place, other remote files are copied."""
    rows = {} if part.row_groups is None else {"row_groups": range(*part.row_groups), "first_row": part.first_row}
    if not part.size:
        return
    if _is_local(fs):
        yield from read_records(Path(path), **rows)
    elif file_format(Path(path)) == ".parquet":
        yield from read_records(Path(path), filesystem=fs, **rows)
    else:
        with TemporaryDirectory(prefix="setfit-kd-") as folder:
            copy = Path(folder) / Path(path).name
            fs.get_file(path, str(copy))
            try:
                yield from read_records(copy)
            except DataError as error:
                raise DataError(error.message.replace(str(copy), part.input), hint=error.hint) from None


@contextmanager
def _replace(fs: AbstractFileSystem, path: str) -> Iterator[IO[bytes]]:
    """Write or replace a file, which appears only if the block succeeds."""
    if _is_local(fs):
        target = Path(path)
        with raise_output_errors(target, alternative="choose another --output"):
            target.parent.mkdir(parents=True, exist_ok=True)
            for stale in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}"):  # of a killed process
                stale.unlink(missing_ok=True)
        with atomic_file(target) as file:
            yield file
    else:
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        with fs.transaction, fs.open(path, "wb") as file:
            yield file
