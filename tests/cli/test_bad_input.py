"""Bad input on the command line: one clear message, exit code 2, and no files left behind."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
from checks import assert_refused, corrupt_file, read_tree, truncate_file
from click.testing import CliRunner, Result

from setfit_kd.cli import main
from setfit_kd.run_folder.folder import RunFolder
from setfit_kd.utils.arrays import save_rows
from setfit_kd.utils.atomic_io import raise_output_errors

VALID_FILES = {
    "labeled.csv": "text,label\n" + "".join(f"{c} text {i},{c}\n" for i in range(4) for c in ("ants", "bees")),
    "pool.txt": "".join(f"pool text {i}\n" for i in range(40)),
    "eval.csv": "text,label\nheld out one,ants\nheld out two,bees\n",
}


QUICK = ("--teacher-steps", "1", "--epochs", "1", "--no-baseline")


@pytest.fixture
def models(tiny_teacher: Path, tiny_student: Path) -> list[str]:
    return ["--teacher", str(tiny_teacher), "--student", str(tiny_student), "--device", "cpu"]


def write_valid_files() -> None:
    for name, content in VALID_FILES.items():
        Path(name).write_text(content, encoding="utf-8")


def invoke_run(*flags: str) -> Result:
    files = ("--labeled", "labeled.csv", "--unlabeled", "pool.txt", "--eval", "eval.csv", "--output-dir", "out")
    return CliRunner().invoke(main, ["run", *files, *QUICK, *flags])


@dataclass(frozen=True)
class BadInput:
    """Expected messages, additional flags, files that replace valid ones (None removes), and a setup function."""

    messages: tuple[str, ...]
    flags: tuple[str, ...] = ()
    files: dict[str, str | bytes | None] = field(default_factory=dict)
    prepare: Callable[[Path], object] = lambda _: None


def bad_labels(content: str | bytes, *messages: str, name: str = "labeled.csv") -> BadInput:
    files: dict[str, str | bytes | None] = {name: content, "eval.csv": "text,label\nheld out one,x\nheld out two,x\n"}
    return BadInput((name, *messages), ("--labeled", name), files)


def bad_parquet(columns: dict[str, list[Any]], *messages: str) -> BadInput:
    return BadInput(
        ("bad.parquet", *messages),
        ("--labeled", "bad.parquet"),
        prepare=lambda _: pq.write_table(pa.table(columns), "bad.parquet"),
    )


def bad_config(content: str | bytes, *messages: str) -> BadInput:
    return BadInput(messages, ("--config", "settings.yaml"), {"settings.yaml": content})


def bad_flags(*flags: str, messages: tuple[str, ...]) -> BadInput:
    return BadInput(messages, flags)


def broken_model(flag: str, name: str, change: Callable[[Path], object]) -> BadInput:
    """Return a case with a copy of the tiny teacher in which one file is changed."""

    def prepare(teacher: Path) -> None:
        shutil.copytree(teacher, "broken")
        change(Path("broken") / name)

    return BadInput(("broken", "Cannot load"), (flag, "broken"), prepare=prepare)


JSON_ROWS = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
CSV_ROWS = "text,label\n" + "".join(f"row {i} of {label},{label}\n" for i in range(2) for label in "xy")

DATA: dict[str, BadInput] = {
    "missing file": BadInput(("labeled.csv", "No such file"), files={"labeled.csv": None}),
    "missing pool": BadInput(("pool.txt", "No such file"), files={"pool.txt": None}),
    "missing file of a missing folder": bad_flags(
        "--eval", "no/such/eval.csv", messages=("No such file", "no/such/eval.csv")
    ),
    "empty file": bad_labels("", "is empty"),
    "only a byte order mark": bad_labels("\ufeff", "labeled.csv"),
    "empty pool": BadInput(("pool.txt is empty",), files={"pool.txt": ""}),
    "only a header": bad_labels("text,label\n", "has no rows"),
    "no text column": bad_labels("headline,label\na,x\n", "no column 'text'", "'headline', 'label'", "--text-column"),
    "semicolons": bad_labels("text;label\na;x\n", "separated by ','", "got ';'", ".tsv"),
    "evaluation set is the labeled file": bad_flags(
        "--eval", "labeled.csv", messages=("labeled.csv", "evaluation set")
    ),
    "no label column": bad_flags(
        "--label-column", "topic", messages=("labeled.csv", "no column 'topic'", "'text', 'label'", "--label-column")
    ),
    "no second text column": bad_flags("--text-column", "text,body", messages=("labeled.csv", "no column 'body'")),
    "eval without a label column": BadInput(("eval.csv", "no column 'label'"), files={"eval.csv": "text,class\na,x\n"}),
    "one class": bad_labels("text,label\na,x\nb,x\n", "only one class", "'x'"),
    "class with one label": bad_labels(CSV_ROWS + "c,z\n", "label 'z', got 1"),
    "class with one label after the leak guard": bad_labels(CSV_ROWS + "c,z\nheld out one,z\n", "label 'z', got 1"),
    "unknown labels in eval": BadInput(
        ("eval.csv", "'wasps'", "'ants', 'bees'"), files={"eval.csv": "text,label\na,wasps\nb,ants\n"}
    ),
    "pool smaller than a batch": BadInput(
        ("batch of 64", "got 48", "--batch-size 48"), ("--batch-size", "64"), {"pool.txt": VALID_FILES["pool.txt"]}
    ),
    "pool smaller than a batch after cleaning": BadInput(
        ("batch of 32", "got 9"), files={"pool.txt": "one\nONE\nants text 0\nheld out one\n" * 20}
    ),
    "pool of leaks only": BadInput(("The pool is empty",), files={"pool.txt": "held out one\nHELD  OUT two\n" * 20}),
    "empty text": bad_labels(CSV_ROWS + ",x\n", "line 6", "the text is empty"),
    "only white space": bad_labels(
        CSV_ROWS + '"\t\n ",x\n \u00a0,y\n', "line 6: the text is empty; line 8: the text is empty"
    ),
    "empty line in the pool": BadInput(("pool.txt, line 3: the text is empty",), files={"pool.txt": "a\nb\n\nc\n"}),
    "missing label": bad_labels(CSV_ROWS + "c,\n", "line 6: no label"),
    "NaN in JSONL": bad_labels(JSON_ROWS + '{"text": NaN, "label": "x"}\n', "line 3: no text", name="bad.jsonl"),
    "null in JSONL": bad_labels(JSON_ROWS + '{"text": null, "label": "x"}\n', "line 3: no text", name="bad.jsonl"),
    "null label in JSONL": bad_labels(
        JSON_ROWS + '{"text": "c", "label": null}\n', "line 3: no label", name="bad.jsonl"
    ),
    "no text in a JSONL row": bad_labels(JSON_ROWS + '{"label": "x"}\n', "line 3: no text", name="bad.jsonl"),
    "number as text": bad_labels(JSON_ROWS + '{"text": 7, "label": "x"}\n', "line 3", "int", name="bad.jsonl"),
    "list as label": bad_labels(JSON_ROWS + '{"text": "c", "label": []}\n', "line 3", "list", name="bad.jsonl"),
    "lone surrogate": bad_labels(JSON_ROWS + '{"text": "\\ud800", "label": "x"}\n', "line 3", name="bad.jsonl"),
    "null in Parquet": bad_parquet({"text": ["a", None], "label": ["x", "y"]}, "row 2: no text"),
    "NaN in Parquet": bad_parquet({"text": ["a", "b"], "label": [1.0, float("nan")]}, "row 2: no label"),
    "null label in Parquet": bad_parquet({"text": ["a", "b"], "label": [None, "y"]}, "row 1: no label"),
    "numbers as text in Parquet": bad_parquet({"text": [1.5, 2.5], "label": ["x", "y"]}, "row 1", "float"),
    "not Parquet": bad_labels(CSV_ROWS, "not a valid Parquet file", name="bad.parquet"),
    "not UTF-8": bad_labels(CSV_ROWS.encode() + "caf\u00e9,x\n".encode("latin-1"), "line 6", "0xe9", "UTF-8"),
    "not UTF-8 in JSONL": bad_labels(JSON_ROWS.encode() + b'{"text": "\xff"}\n', "line 3", "0xff", name="bad.jsonl"),
    "not UTF-8 in the pool": BadInput(("pool.txt, line 2", "0xe9"), files={"pool.txt": b"one\ncaf\xe9\n"}),
    "UTF-16": bad_labels(CSV_ROWS.encode("utf-16"), "line 1", "UTF-8"),
    "broken JSON": bad_labels(JSON_ROWS + '{"text": "c", "label"\n', "line 3: not valid JSON", name="bad.jsonl"),
    "truncated JSON": bad_labels(JSON_ROWS[:-6], "line 2: not valid JSON", name="bad.jsonl"),
    "deeply nested JSON": bad_labels(JSON_ROWS + "[" * 200_000 + "\n", "line 3", name="bad.jsonl"),
    "very long number in JSON": bad_labels(
        JSON_ROWS + '{"text": "c", "label": ' + "9" * 5000 + "}\n", "3", name="bad.jsonl"
    ),
    "very long number as label": bad_labels(CSV_ROWS + f"c,{'9' * 5000}\nd,{'9' * 5000}\ne,z\n", "label 'z', got 1"),
    "JSON list": bad_labels(JSON_ROWS + '["c", "x"]\n', "line 3", "expected a JSON object, got list", name="bad.jsonl"),
    "JSON string": bad_labels('"a"\n', "line 1", "expected a JSON object, got str", name="bad.jsonl"),
    "too many fields": bad_labels(CSV_ROWS + "a, b,x\n", "line 6: expected 2 fields, got 3"),
    "too few fields": bad_labels(CSV_ROWS + "a\n", "line 6: expected 2 fields, got 1"),
    "unclosed quote": bad_labels(CSV_ROWS + '"a,x\nb,y\n', "line 6"),
    "stray quote": bad_labels(CSV_ROWS + '"a"b,x\n', "line 6"),
    "unknown file extension": bad_labels(CSV_ROWS, "'.xlsx'", ".csv, .tsv, .jsonl", name="labeled.xlsx"),
    "no file extension": bad_labels(CSV_ROWS, ".csv, .tsv, .jsonl", name="labeled"),
    "folder without a data set": BadInput(
        ("folder as a data set",), ("--labeled", "folder"), prepare=lambda _: Path("folder").mkdir()
    ),
    "folder with the name of a file": BadInput(
        ("d.csv",), ("--labeled", "d.csv"), prepare=lambda _: Path("d.csv").mkdir()
    ),
    "split of a file": bad_flags("--labeled", "labeled.csv[train]", messages=("labeled.csv",)),
    "unknown bundled corpus": bad_flags("--labeled", "bundled:books", messages=("bundled:books", "bundled:newswire")),
}

MODELS: dict[str, BadInput] = {
    "folder without a model": BadInput(
        ("notes", "not a model", "modules.json"), ("--teacher", "notes"), prepare=lambda _: Path("notes").mkdir()
    ),
    "missing folder": bad_flags("--teacher", "./nowhere", messages=("No such model folder", "nowhere")),
    "missing student": bad_flags("--student", "/no/such/model", messages=("No such model folder", "/no/such/model")),
    "file as model": bad_flags("--teacher", "labeled.csv", messages=("labeled.csv",)),
    "unknown demo": bad_flags("--teacher", "demo:bert", messages=("demo:bert", "demo:all-MiniLM-L6-v2")),
    "truncated weights": broken_model("--teacher", "model.safetensors", truncate_file),
    "corrupt weights": broken_model("--teacher", "model.safetensors", corrupt_file),
    "missing weights": broken_model("--teacher", "model.safetensors", Path.unlink),
    "truncated student weights": broken_model("--student", "model.safetensors", truncate_file),
    "broken config": broken_model("--teacher", "config.json", truncate_file),
    "broken tokenizer": broken_model("--teacher", "tokenizer.json", truncate_file),
    "broken modules": broken_model("--teacher", "modules.json", truncate_file),
    "layer out of range": bad_flags("--student", "layers:0,9", messages=("0, 9", "4", "from 0 to 3")),
    "layer twice": bad_flags("--student", "layers:1,1", messages=("1, 1",)),
    "layers that are not numbers": bad_flags("--student", "layers:x", messages=("'layers:x'", "layers:0,2,5")),
    "no layers": bad_flags("--student", "layers:", messages=("'layers:'", "layers:0,2,5")),
}

OUTPUTS: dict[str, BadInput] = {
    "output folder is a file": bad_flags(
        "--output-dir", "eval.csv", messages=("eval.csv", "is a file", "--output-dir")
    ),
    "output folder is not empty": BadInput(("out", "not empty", "--overwrite"), files={"out/mine.txt": "mine"}),
    "output folder below a file": bad_flags(
        "--output-dir", "eval.csv/run", messages=("eval.csv is a file", "--output-dir")
    ),
    "output folder far below a file": bad_flags("--output-dir", "eval.csv/a/b/c", messages=("eval.csv is a file",)),
    "output folder is a dead link": BadInput(
        ("dead",), ("--output-dir", "dead"), prepare=lambda _: Path("dead").symlink_to("nowhere/at/all")
    ),
}

SETTINGS: dict[str, BadInput] = {
    "unknown preset": bad_flags("--preset", "imdb", messages=("imdb", "ag_news", "newswire")),
    "unknown flag": bad_flags("--lables", "x", messages=("--lables", "--labeled")),
    "missing config": bad_flags("--config", "no.yaml", messages=("no.yaml", "No such file", "--config")),
    "config is a folder": BadInput(
        ("notes", "--config"), ("--config", "notes"), prepare=lambda _: Path("notes").mkdir()
    ),
    "unknown key": bad_config("epoch: 2\n", "epoch", "unknown setting", "epochs"),
    "unknown keys": bad_config("epoch: 2\nshot: 3\n", "epoch", "shot"),
    "broken YAML": bad_config("epochs: 2\nshots: [1\n", "settings.yaml", "line"),
    "tab in YAML": bad_config("epochs: 2\n\tshots: 3\n", "settings.yaml, line 2"),
    "list in YAML": bad_config("- epochs\n", "settings.yaml", "name: value"),
    "string in YAML": bad_config("epochs\n", "settings.yaml", "name: value"),
    "config is not UTF-8": bad_config(b"labeled: caf\xe9.csv\n", "settings.yaml", "UTF-8"),
    "string as a number": bad_config("batch_size: many\n", "batch_size", "many"),
    "null as a number": bad_config("alpha:\n", "alpha"),
    "list as a name": bad_config("objective: [pairs]\n", "objective"),
    "shots": bad_flags("--shots", "1", messages=("shots", "greater than or equal to 2", "1")),
    "epochs": bad_flags("--epochs", "0", messages=("epochs", "greater than or equal to 1", "0")),
    "learning rate": bad_flags("--learning-rate", "5", messages=("learning_rate", "less than 1", "5")),
    "learning rate nan": bad_flags("--learning-rate", "nan", messages=("learning_rate", "nan")),
    "gold weight infinite": bad_flags("--gold-weight", "inf", messages=("gold_weight", "inf")),
    "batch size 3": bad_flags("--batch-size", "3", messages=("batch_size", "greater than or equal to 4")),
    "negative seed": bad_flags("--seed", "-1", messages=("seed", "greater than or equal to 0", "-1")),
    "string for a number flag": bad_flags("--epochs", "many", messages=("--epochs", "many")),
    "objective": bad_flags("--objective", "triplet", messages=("objective", "triplet", "similarity", "pairs")),
    "objective without weight": bad_flags("--objective", "similarity=", messages=("objective", "must be a number")),
    "objective with weight 0": bad_flags("--objective", "similarity=0", messages=("objective", "positive")),
    "duplicate objective": bad_flags("--objective", "embedding,embedding=2", messages=("objective", "twice")),
    "pairs with another objective": bad_flags(
        "--objective", "pairs,similarity", messages=("objective", "pairs cannot be combined")
    ),
    "fp16 on a cpu": bad_flags("--precision", "fp16", "--device", "cpu", messages=("fp16", "CUDA", "--precision")),
    "micro-batch size 0": bad_flags(
        "--micro-batch-size", "0", messages=("micro_batch_size", "greater than or equal to 1")
    ),
    "head_c 0": bad_flags("--head-c", "0", messages=("head_c", "positive")),
    "head_c not a number": bad_flags("--head-c", "strong", messages=("head_c", "auto")),
    "alpha above 1": bad_flags("--alpha", "1.5", messages=("alpha", "less than or equal to 1")),
    "temperature 0": bad_flags("--temperature", "0", messages=("temperature", "greater than or equal to 0.01")),
    "unknown device": bad_flags("--device", "tpu", messages=("device", "tpu", "cpu")),
    "missing device": bad_flags("--device", "cuda:99", messages=("cuda:99", "auto")),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for table in (DATA, MODELS, OUTPUTS, SETTINGS) for name, case in table.items()]
)
def test_rejects_bad_input(case: BadInput, models: list[str], tiny_teacher: Path, tmp_path: Path) -> None:
    write_valid_files()
    for name, content in case.files.items():
        path = Path(name)
        if content is None:
            path.unlink()
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    case.prepare(tiny_teacher)
    before = read_tree(tmp_path)
    result = invoke_run(*models, *case.flags)
    assert_refused(result, *case.messages)
    assert read_tree(tmp_path) == before


def test_accepts_valid_input(models: list[str], tmp_path: Path) -> None:
    write_valid_files()
    before = read_tree(tmp_path)
    result = invoke_run(*models, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "steps" in result.stdout
    assert read_tree(tmp_path) == before


FILES_IN_YAML = "labeled: labeled.csv\nunlabeled: pool.txt\n"


@pytest.mark.parametrize(
    ("sources", "settings", "messages"),
    [
        pytest.param(("--labeled", "labeled.csv"), "", ("--unlabeled",), id="no pool"),
        pytest.param(("--labeled", "", "--unlabeled", "pool.txt"), "", ("labeled",), id="empty labeled"),
        pytest.param((), FILES_IN_YAML + "text_column: 5\n", ("text_column", "5"), id="number as text_column"),
        pytest.param((), FILES_IN_YAML + "label_column: [a]\n", ("label_column",), id="list as label_column"),
        pytest.param((), FILES_IN_YAML + "shots: 1\n", ("shots", "greater than or equal to 2"), id="shots"),
    ],
)
def test_rejects_bad_sources(
    sources: tuple[str, ...], settings: str, messages: tuple[str, ...], models: list[str], tmp_path: Path
) -> None:
    write_valid_files()
    Path("settings.yaml").write_text(settings, encoding="utf-8")
    before = read_tree(tmp_path)
    flags = ["--config", "settings.yaml", *sources, *models, *QUICK, "--output-dir", "out"]
    assert_refused(CliRunner().invoke(main, ["run", *flags]), *messages)
    assert read_tree(tmp_path) == before


def test_rejects_cuda_without_a_gpu(models: list[str], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("CUDA is available")
    write_valid_files()
    assert_refused(invoke_run(*models, "--device", "cuda"), "'cuda'", "--device auto")
    assert not (tmp_path / "out").exists()


def test_warns_about_fewer_labels_than_shots(models: list[str]) -> None:
    write_valid_files()
    Path("labeled.csv").write_text(
        VALID_FILES["labeled.csv"] + "more ants,ants\neven more ants,ants\n", encoding="utf-8"
    )
    result = invoke_run(*models, "--shots", "5", "--dry-run")
    assert result.exit_code == 0, result.stderr
    stderr = " ".join(result.stderr.split())
    assert "Class 'bees' has only 4 labeled texts, expected 5" in stderr
    assert "'ants'" not in stderr


def test_rejects_folder_without_write_permission(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_valid_files()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    before = read_tree(tmp_path)
    result = invoke_run(*models, "--output-dir", str(tmp_path / "new" / "run"))
    assert_refused(result, str(tmp_path), "is not writable", "--output-dir")
    assert read_tree(tmp_path) == before


def test_rejects_read_only_file_system(models: list[str], mount: Callable[[str], Path]) -> None:
    write_valid_files()
    folder = mount("ro,size=64k")
    result = invoke_run(*models, "--output-dir", str(folder / "run"))
    assert_refused(result, str(folder), "is not writable", "--output-dir")


EXPECTED_FILES = {
    "teacher": {"model.safetensors", "modules.json", "head.safetensors", "head.json", "model_head.pkl"},
    "signals": {"signals.json", "texts.jsonl", "probabilities.npy", "embeddings.npy"},
    "evaluation": {"texts.jsonl"},
    "evaluation/teacher": {"measured.json", "probabilities.npy"},
}


def assert_full_disk(result: Result, folder: Path, *, done: set[str]) -> None:
    """Check that the message reports a full disk, and that the folder contains only completed stages."""
    assert_refused(result, str(folder), "The disk is full", "--output-dir")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert names - {"config.yaml", "run.json", "run.log", ".lock"} == {name for name in done if "/" not in name}
    for name in done:
        assert {path.name for path in (folder / name).iterdir()} >= EXPECTED_FILES[name]


@pytest.mark.parametrize(
    ("free_kb", "done"),
    [
        pytest.param(0, set(), id="at the settings"),
        pytest.param(4, set(), id="at the log"),
        pytest.param(256, {"evaluation"}, id="at the teacher"),
        pytest.param(640, {"teacher", "signals", "evaluation", "evaluation/teacher"}, id="at the student"),
    ],
)
def test_reports_full_disk(free_kb: int, done: set[str], models: list[str], mount: Callable[[str], Path]) -> None:
    write_valid_files()
    folder = mount("size=1m")
    usage = shutil.disk_usage(folder)
    (folder / "ballast").write_bytes(bytes(usage.free - free_kb * 1024))
    result = invoke_run(*models, "--verbose", "--output-dir", str(folder / "run"))
    assert_full_disk(result, folder / "run", done=done)


DISK_FULL_ERRORS = {
    "system error": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "tensor writer's error": safetensors.SafetensorError("I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize(
    ("stage", "error", "done"),
    [
        ("teacher", "tensor writer's error", {"evaluation"}),
        ("signals", "system error", {"teacher", "evaluation"}),
        ("student", "system error", {"teacher", "signals", "evaluation", "evaluation/teacher"}),
        ("student", "tensor writer's error", {"teacher", "signals", "evaluation", "evaluation/teacher"}),
    ],
)
def test_reports_disk_full_while_writing_tensors(
    stage: str, error: str, done: set[str], models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_valid_files()
    original_serialize_file, original_save_rows = safetensors.serialize_file, save_rows

    def fail_at_stage(path: Any) -> None:
        if f".{stage}." in str(path):
            Path(path).write_bytes(b"half")
            raise DISK_FULL_ERRORS[error]

    def write_tensors(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        fail_at_stage(filename)
        original_serialize_file(tensors, filename, *args, **kwargs)

    def write_rows(array: Any, path: Path, **kwargs: Any) -> None:
        fail_at_stage(path)
        original_save_rows(array, path, **kwargs)

    for module in (safetensors.torch, safetensors.numpy):
        monkeypatch.setattr(module, "serialize_file", write_tensors)
    monkeypatch.setattr("setfit_kd.signals.signals.save_rows", write_rows)
    result = invoke_run(*models, "--output-dir", str(tmp_path / "out"))
    assert_full_disk(result, tmp_path / "out", done=done)


def test_reports_disk_full_while_writing_a_file(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_valid_files()
    original = Path.write_text

    def fail_on_settings(path: Path, *args: Any, **kwargs: Any) -> int:
        if not path.name.startswith(".config.yaml."):
            return original(path, *args, **kwargs)
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fail_on_settings)
    assert_full_disk(invoke_run(*models), Path("out"), done=set())
    assert set(read_tree(tmp_path / "out")) == {".lock", "run.json"}


def test_failed_write_keeps_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("metrics.json", {"accuracy": 1})
    before = read_tree(tmp_path)

    def fail(path: Path, *_: Any, **__: Any) -> int:
        path.touch()
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="quota"):
        folder.write_json("metrics.json", {"accuracy": 0})
    assert read_tree(tmp_path) == before


def test_suppressed_write_error_is_not_reported(tmp_path: Path) -> None:
    def fail() -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise KeyError("no such column") from None

    with pytest.raises(KeyError, match="no such column"), raise_output_errors(tmp_path / "out"):
        fail()
