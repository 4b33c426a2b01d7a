"""Bad input on the command line: one clear message, exit code 2, and no files left behind."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
from checks import assert_refused, invoke, read_tree, truncate_file
from click.testing import Result

from setfit_kd.errors import OutputError
from setfit_kd.utils.arrays import save_rows
from setfit_kd.utils.atomic_io import raise_output_errors, write_text

VALID_FILES = {
    "labeled.csv": "text,label\n" + "".join(f"{c} text {i},{c}\n" for i in range(4) for c in ("ants", "bees")),
    "pool.txt": "".join(f"pool text {i}\n" for i in range(40)),
    "eval.csv": "text,label\nheld out one,ants\nheld out two,bees\n",
}
QUICK = ("--teacher-steps", "1", "--epochs", "1", "--no-baseline", "--augment", "0")


@pytest.fixture(autouse=True)
def valid_files(tmp_path: Path) -> None:
    for name, content in VALID_FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")


@pytest.fixture
def models(tiny_teacher: Path, tiny_student: Path) -> list[str]:
    return ["--teacher", str(tiny_teacher), "--student", str(tiny_student), "--device", "cpu"]


def invoke_run(*flags: str) -> Result:
    files = ("--labeled", "labeled.csv", "--unlabeled", "pool.txt", "--eval", "eval.csv", "--output-dir", "out")
    return invoke("run", *files, *QUICK, *flags)


def assert_run_refused(*flags: str, messages: tuple[str, ...]) -> None:
    """Check that a run is refused with these messages and writes no files."""
    before = read_tree(Path())
    assert_refused(invoke_run(*flags), *messages)
    assert read_tree(Path()) == before


CSV = "text,label\n" + "".join(f"row {i} of {label},{label}\n" for i in range(2) for label in "xy")
JSONL = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'

FILES: list[tuple[str, str | bytes | None, tuple[str, ...]]] = [
    ("labeled.csv", None, ("No such file",)),
    ("labeled.csv", "", ("is empty",)),
    ("labeled.csv", "text,label\n", ("has no rows",)),
    ("labeled.csv", "headline,label\na,x\n", ("no column 'text'", "'headline', 'label'", "--text-column")),
    ("labeled.csv", "text;label\na;x\n", ("separated by ','", "got ';'", ".tsv")),
    ("eval.csv", "text,class\na,x\n", ("no column 'label'",)),
    ("labeled.csv", "text,label\na,x\nb,x\n", ("only one class", "'x'")),
    ("labeled.csv", CSV + "c,z\nheld out one,z\n", ("label 'z', got 1",)),
    ("eval.csv", "text,label\na,wasps\nb,ants\n", ("'wasps'", "'ants', 'bees'")),
    ("pool.txt", "one\nONE\nants text 0\nheld out one\n" * 20, ("batch of 32", "got 9")),
    ("pool.txt", "held out one\nHELD  OUT two\n" * 20, ("The pool is empty",)),
    ("labeled.csv", CSV + '"\t\n ",x\n \u00a0,y\n', ("line 6: the text is empty; line 8: the text is empty",)),
    ("labeled.csv", CSV + "c,\n", ("line 6: no label",)),
    ("bad.jsonl", JSONL + '{"text": NaN, "label": "x"}\n', ("line 3: no text",)),
    ("bad.jsonl", JSONL + '{"text": 7, "label": "x"}\n', ("line 3", "int")),
    ("bad.jsonl", JSONL + '{"text": "\\ud800", "label": "x"}\n', ("line 3",)),
    ("bad.parquet", CSV, ("not a valid Parquet file",)),
    ("labeled.csv", CSV.encode() + "caf\u00e9,x\n".encode("latin-1"), ("line 6", "0xe9", "UTF-8")),
    ("labeled.csv", CSV.encode("utf-16"), ("line 1", "UTF-8")),
    ("bad.jsonl", JSONL[:-6], ("line 2: not valid JSON",)),
    ("bad.jsonl", JSONL + "[" * 200_000 + "\n", ("line 3",)),
    ("bad.jsonl", JSONL + '{"text": "c", "label": ' + "9" * 5000 + "}\n", ("line 3",)),
    ("bad.jsonl", JSONL + '["c", "x"]\n', ("line 3", "expected a JSON object, got list")),
    ("labeled.csv", CSV + "a, b,x\n", ("line 6: expected 2 fields, got 3",)),
    ("labeled.csv", CSV + '"a,x\nb,y\n', ("line 6",)),
    ("labeled.xlsx", CSV, ("'.xlsx'", ".csv, .tsv, .jsonl")),
    ("bad.jsonl", JSONL + '{"text": "c", "label": ["x"]}\n', ("bad.jsonl, line 3: expected one label",)),
    ("bad.jsonl", '{"text": "a", "label": ["x", {}]}\n', ("bad.jsonl, line 1", "got dict")),
]


@pytest.mark.parametrize(("name", "content", "messages"), FILES, ids=range(len(FILES)))
def test_rejects_bad_files(name: str, content: str | bytes | None, messages: tuple[str, ...]) -> None:
    if content is None:
        Path(name).unlink()
    else:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    flags = () if name in VALID_FILES else ("--labeled", name)
    if name not in ("eval.csv", "pool.txt"):
        Path("eval.csv").write_text("text,label\nheld out one,x\nheld out two,x\n")
    assert_run_refused(*flags, "--device", "cpu", messages=messages)


def test_rejects_bad_parquet() -> None:
    columns: dict[str, dict[str, list[Any]]] = {
        "row 2: no text": {"text": ["a", None], "label": ["x", "y"]},
        "row 2: no label": {"text": ["a", "b"], "label": [1.0, float("nan")]},
        "row 1": {"text": [1.5, 2.5], "label": ["x", "y"]},
    }
    for message, table in columns.items():
        pq.write_table(pa.table(table), "bad.parquet")
        assert_run_refused("--labeled", "bad.parquet", messages=("bad.parquet", message))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--label-columns", "label"), "eval.csv, line 2: expected 0 or 1 in 'label', got 'ants'"),
        (("--label-columns", "no"), "eval.csv has no column 'no'"),
        (("--label-separator", "a"), "eval.csv, line 2: an empty label in 'ants'"),
        (
            ("--label-columns", "x,y", "--label-separator", "|"),
            "label_columns: cannot be combined with label_separator",
        ),
        (("--label-columns", "x,x"), "x is listed twice"),
        (("--label-separator", ""), "label_separator"),
    ],
)
@pytest.mark.parametrize("command", ["run", "finetune", "evaluate"])
def test_rejects_bad_label_columns(command: str, flags: tuple[str, ...], message: str) -> None:
    arguments = {"run": [], "finetune": ["nowhere"], "evaluate": ["nowhere", "--eval", "eval.csv"]}[command]
    if command != "evaluate":
        arguments += ["--labeled", "eval.csv", "--output-dir", "out"]
    assert_refused(invoke(command, *arguments, *flags), message)
    assert not Path("out").exists()


CONFIGS: list[tuple[str | bytes, tuple[str, ...]]] = [
    ("epoch: 2\nshot: 3\n", ("epoch", "shot", "unknown setting", "epochs")),
    ("epochs: 2\n\tshots: 3\n", ("settings.yaml, line 2",)),
    ("- epochs\n", ("settings.yaml", "name: value")),
    (b"labeled: caf\xe9.csv\n", ("settings.yaml", "UTF-8")),
    ("alpha:\n", ("alpha",)),
    ("text_column: 5\n", ("text_column", "5")),
]


@pytest.mark.parametrize(("content", "messages"), CONFIGS)
def test_rejects_bad_config_files(content: str | bytes, messages: tuple[str, ...]) -> None:
    Path("settings.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    assert_run_refused("--config", "settings.yaml", messages=messages)


FLAGS = [
    ("--preset imdb", ("imdb", "ag_news", "newswire")),
    ("--lables x", ("--lables", "--labeled")),
    ("--config no.yaml", ("no.yaml", "No such file", "--config")),
    ("--shots 1", ("shots", "greater than or equal to 2", "1")),
    ("--learning-rate nan", ("learning_rate", "nan")),
    ("--epochs many", ("--epochs", "many")),
    ("--objective triplet", ("objective", "triplet", "similarity", "pairs")),
    ("--head-c 0", ("head_c", "greater than 0")),
    ("--device tpu", ("device", "tpu", "cpu")),
    ("--device cuda:99", ("'cuda:99'", "--device auto")),
    ("--batch-size 64", ("batch of 64", "got 48", "--batch-size 48")),
    ("--eval labeled.csv", ("labeled.csv", "evaluation set")),
    ("--labeled folder", ("Cannot read folder", "save_to_disk")),
    ("--labeled d.csv", ("d.csv",)),
    ("--labeled labeled.csv[train]", ("labeled.csv",)),
    ("--labeled bundled:books", ("bundled:books", "bundled:newswire")),
    ("--teacher folder", ("folder", "not a model", "modules.json")),
    ("--teacher ./nowhere", ("No such model folder", "nowhere")),
    ("--teacher demo:bert", ("demo:bert", "demo:all-MiniLM-L6-v2")),
    ("--student layers:0,9", ("0, 9", "4", "from 0 to 3")),
    ("--student layers:1,1", ("1, 1",)),
    ("--output-dir folder", ("folder", "not empty", "--overwrite")),
    ("--output-dir eval.csv/a/b/c", ("eval.csv is a file", "--output-dir")),
    ("--output-dir dead", ("dead",)),
]


@pytest.mark.parametrize(("flags", "messages"), FLAGS)
def test_rejects_bad_flags(flags: str, messages: tuple[str, ...], models: list[str]) -> None:
    for folder in ("folder", "d.csv"):
        Path(folder).mkdir()
    Path("folder/mine.txt").write_text("mine")
    Path("dead").symlink_to("nowhere/at/all")
    assert_run_refused(*models, *flags.split(), messages=messages)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", truncate_file),
        ("model.safetensors", Path.unlink),
        ("config.json", truncate_file),
        ("tokenizer.json", truncate_file),
        ("modules.json", truncate_file),
    ],
)
def test_rejects_broken_models(
    name: str, change: Callable[[Path], object], models: list[str], tiny_teacher: Path
) -> None:
    shutil.copytree(tiny_teacher, "broken")
    change(Path("broken") / name)
    assert_run_refused("--teacher", "broken", *models[2:], messages=("broken", "Cannot load"))


def test_rejects_missing_sources(models: list[str]) -> None:
    for sources, message in ((("labeled.csv",), "--unlabeled"), (("", "--unlabeled", "pool.txt"), "labeled")):
        assert_refused(invoke("run", "--labeled", *sources, *models, *QUICK, "--output-dir", "out"), message)
    assert not Path("out").exists()


def test_accepts_valid_input_and_warns_about_fewer_labels_than_shots(models: list[str], tmp_path: Path) -> None:
    Path("labeled.csv").write_text(VALID_FILES["labeled.csv"] + "more ants,ants\neven more ants,ants\n")
    before = read_tree(tmp_path)
    result = invoke_run(*models, "--shots", "5", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "Class 'bees' has only 4 labeled texts, expected 5" in result.stderr
    assert "'ants'" not in result.stderr
    assert read_tree(tmp_path) == before


def test_rejects_folder_without_write_permission(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    messages = (str(tmp_path), "is not writable", "--output-dir")
    assert_run_refused(*models, "--output-dir", "new/run", messages=messages)


ALL_STAGES = ("teacher", "cross_fitted", "signals", "evaluation")  # before the student


def assert_full_disk(result: Result, folder: Path, *done: str) -> None:
    """Check that the message reports a full disk, and that the folder contains only completed stages."""
    assert_refused(result, str(folder), "The disk is full", "--output-dir")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert names - {"config.yaml", "run.json", "run.log", ".lock"} == set(done)


@pytest.mark.parametrize(("free_kb", "done"), [(0, ()), (256, ("evaluation",)), (640, ALL_STAGES)])
def test_reports_full_disk(free_kb: int, done: tuple[str], models: list[str], mount: Callable[[str], Path]) -> None:
    folder = mount("size=1m")
    (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - free_kb * 1024))
    result = invoke_run(*models, "--verbose", "--output-dir", str(folder / "run"))
    assert_full_disk(result, folder / "run", *done)


DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("stage", "error", "done"),
    [
        ("teacher", safetensors.SafetensorError("No space left on device (os error 28)"), ["evaluation"]),
        ("signals", DISK_FULL, ["teacher", "cross_fitted", "evaluation"]),
        ("student", DISK_FULL, ALL_STAGES),
    ],
)
def test_reports_disk_full_while_writing_tensors(
    stage: str, error: Exception, done: list[str], models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_stage(write: Callable[..., Any]) -> Callable[..., Any]:
        def write_or_fail(content: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            if f".{stage}." in str(path):
                Path(path).write_bytes(b"half")
                raise error
            return write(content, path, *args, **kwargs)

        return write_or_fail

    for module in (safetensors.torch, safetensors.numpy):
        monkeypatch.setattr(module, "serialize_file", fail_at_stage(safetensors.serialize_file))
    monkeypatch.setattr("setfit_kd.signals.signals.save_rows", fail_at_stage(save_rows))
    result = invoke_run(*models, "--output-dir", str(tmp_path / "out"))
    assert_full_disk(result, tmp_path / "out", *done)


def test_failed_write_keeps_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_text(file, "before")

    def fail(path: Path, *_: Any, **__: Any) -> None:
        path.touch()
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        with pytest.raises(OutputError, match="quota"):
            write_text(file, "after")
    assert file.read_text() == "before"
    assert list(tmp_path.glob(".*")) == []


def test_suppressed_write_error_is_not_reported(tmp_path: Path) -> None:
    def fail() -> None:
        try:
            raise DISK_FULL
        except OSError:
            raise KeyError("no such column") from None

    with pytest.raises(KeyError, match="no such column"), raise_output_errors(tmp_path / "out"):
        fail()
