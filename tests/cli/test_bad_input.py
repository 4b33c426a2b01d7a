"""Bad input through the real command line: one clear message, exit code 2, and nothing left behind."""

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
from checks import assert_refused, halve, scribble, tree
from click.testing import CliRunner, Result

from setfit_kd.cli import main
from setfit_kd.run_folder import RunFolder
from setfit_kd.utils.arrays import save_rows
from setfit_kd.utils.atomic_io import write_errors

GOOD = {
    "labeled.csv": "text,label\n" + "".join(f"{c} text {i},{c}\n" for i in range(4) for c in ("ants", "bees")),
    "pool.txt": "".join(f"pool text {i}\n" for i in range(40)),
    "eval.csv": "text,label\nheld out one,ants\nheld out two,bees\n",
}


QUICK = ("--teacher-steps", "1", "--epochs", "1", "--no-baseline")


@pytest.fixture
def models(tiny_teacher: Path, tiny_student: Path) -> list[str]:
    return ["--teacher", str(tiny_teacher), "--student", str(tiny_student), "--device", "cpu"]


def write_good() -> None:
    for name, content in GOOD.items():
        Path(name).write_text(content, encoding="utf-8")


def invoke_run(*flags: str) -> Result:
    files = ("--labeled", "labeled.csv", "--unlabeled", "pool.txt", "--eval", "eval.csv", "--output-dir", "out")
    return CliRunner().invoke(main, ["run", *files, *QUICK, *flags])


@dataclass(frozen=True)
class Bad:
    """Files that take the place of good ones (None removes), flags beside the good ones, and what shall be said."""

    says: tuple[str, ...]
    flags: tuple[str, ...] = ()
    files: dict[str, str | bytes | None] = field(default_factory=dict)
    arrange: Callable[[Path], object] = lambda _: None


def labeled(content: str | bytes, *says: str, name: str = "labeled.csv") -> Bad:
    files: dict[str, str | bytes | None] = {name: content, "eval.csv": "text,label\nheld out one,x\nheld out two,x\n"}
    return Bad((name, *says), ("--labeled", name), files)


def parquet(columns: dict[str, list[Any]], *says: str) -> Bad:
    return Bad(
        ("bad.parquet", *says),
        ("--labeled", "bad.parquet"),
        arrange=lambda _: pq.write_table(pa.table(columns), "bad.parquet"),
    )


def config(content: str | bytes, *says: str) -> Bad:
    return Bad(says, ("--config", "settings.yaml"), {"settings.yaml": content})


def flags(*given: str, says: tuple[str, ...]) -> Bad:
    return Bad(says, given)


def broken_model(flag: str, name: str, change: Callable[[Path], object]) -> Bad:
    """A copy of the tiny teacher with one of its files changed."""

    def arrange(teacher: Path) -> None:
        shutil.copytree(teacher, "broken")
        change(Path("broken") / name)

    return Bad(("broken", "does not load"), (flag, "broken"), arrange=arrange)


JSON_ROWS = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
CSV_ROWS = "text,label\n" + "".join(f"row {i} of {label},{label}\n" for i in range(2) for label in "xy")

DATA: dict[str, Bad] = {
    "missing file": Bad(("labeled.csv", "There is no file"), files={"labeled.csv": None}),
    "missing pool": Bad(("pool.txt", "There is no file"), files={"pool.txt": None}),
    "missing file of a missing folder": flags(
        "--eval", "no/such/eval.csv", says=("There is no file", "no/such/eval.csv")
    ),
    "empty file": labeled("", "is empty"),
    "byte order mark alone": labeled("\ufeff", "labeled.csv"),
    "empty pool": Bad(("pool.txt is empty",), files={"pool.txt": ""}),
    "header only": labeled("text,label\n", "There are no rows"),
    "no text column": labeled("headline,label\na,x\n", "no column 'text'", "'headline', 'label'", "--text-column"),
    "no label column": flags(
        "--label-column", "topic", says=("labeled.csv", "no column 'topic'", "'text', 'label'", "--label-column")
    ),
    "no second text column": flags("--text-column", "text,body", says=("labeled.csv", "no column 'body'")),
    "eval without a label column": Bad(("eval.csv", "no column 'label'"), files={"eval.csv": "text,class\na,x\n"}),
    "one class": labeled("text,label\na,x\nb,x\n", "one class only", "'x'"),
    "label that occurs once": labeled(CSV_ROWS + "c,z\n", "'z'", "once"),
    "label that occurs once after the leak guard": labeled(CSV_ROWS + "c,z\nheld out one,z\n", "'z'", "once"),
    "labels of eval that training lacks": Bad(
        ("eval.csv", "'wasps'", "'ants', 'bees'"), files={"eval.csv": "text,label\na,wasps\nb,ants\n"}
    ),
    "pool smaller than a batch": Bad(
        ("48 texts", "batch of 64", "--batch-size 48"), ("--batch-size", "64"), {"pool.txt": GOOD["pool.txt"]}
    ),
    "pool smaller than a batch after cleaning": Bad(
        ("9 texts", "batch of 32"), files={"pool.txt": "one\nONE\nants text 0\nheld out one\n" * 20}
    ),
    "pool of leaks alone": Bad(("No pool text is left",), files={"pool.txt": "held out one\nHELD  OUT two\n" * 20}),
    "empty text": labeled(CSV_ROWS + ",x\n", "line 6", "the text is empty"),
    "white space": labeled(CSV_ROWS + '"\t\n ",x\n \u00a0,y\n', "line 6: the text is empty; line 8: the text is empty"),
    "empty line in the pool": Bad(("pool.txt, line 3: the text is empty",), files={"pool.txt": "a\nb\n\nc\n"}),
    "missing label": labeled(CSV_ROWS + "c,\n", "line 6: no label"),
    "NaN in JSONL": labeled(JSON_ROWS + '{"text": NaN, "label": "x"}\n', "line 3: no text", name="bad.jsonl"),
    "null in JSONL": labeled(JSON_ROWS + '{"text": null, "label": "x"}\n', "line 3: no text", name="bad.jsonl"),
    "null label in JSONL": labeled(JSON_ROWS + '{"text": "c", "label": null}\n', "line 3: no label", name="bad.jsonl"),
    "no text in a JSONL row": labeled(JSON_ROWS + '{"label": "x"}\n', "line 3: no text", name="bad.jsonl"),
    "number as text": labeled(JSON_ROWS + '{"text": 7, "label": "x"}\n', "line 3", "int", name="bad.jsonl"),
    "list as label": labeled(JSON_ROWS + '{"text": "c", "label": []}\n', "line 3", "list", name="bad.jsonl"),
    "lone surrogate": labeled(JSON_ROWS + '{"text": "\\ud800", "label": "x"}\n', "line 3", name="bad.jsonl"),
    "null in Parquet": parquet({"text": ["a", None], "label": ["x", "y"]}, "row 2: no text"),
    "NaN in Parquet": parquet({"text": ["a", "b"], "label": [1.0, float("nan")]}, "row 2: no label"),
    "null label in Parquet": parquet({"text": ["a", "b"], "label": [None, "y"]}, "row 1: no label"),
    "numbers as text in Parquet": parquet({"text": [1.5, 2.5], "label": ["x", "y"]}, "row 1", "float"),
    "not Parquet": labeled(CSV_ROWS, "not a whole Parquet file", name="bad.parquet"),
    "not UTF-8": labeled(CSV_ROWS.encode() + "caf\u00e9,x\n".encode("latin-1"), "line 6", "0xe9", "UTF-8"),
    "not UTF-8 in JSONL": labeled(JSON_ROWS.encode() + b'{"text": "\xff"}\n', "line 3", "0xff", name="bad.jsonl"),
    "not UTF-8 in the pool": Bad(("pool.txt, line 2", "0xe9"), files={"pool.txt": b"one\ncaf\xe9\n"}),
    "UTF-16": labeled(CSV_ROWS.encode("utf-16"), "line 1", "UTF-8"),
    "broken JSON": labeled(JSON_ROWS + '{"text": "c", "label"\n', "line 3: not valid JSON", name="bad.jsonl"),
    "cut-off JSON": labeled(JSON_ROWS[:-6], "line 2: not valid JSON", name="bad.jsonl"),
    "bottomless JSON": labeled(JSON_ROWS + "[" * 200_000 + "\n", "line 3", name="bad.jsonl"),
    "endless number in JSON": labeled(
        JSON_ROWS + '{"text": "c", "label": ' + "9" * 5000 + "}\n", "3", name="bad.jsonl"
    ),
    "endless number as label": labeled(CSV_ROWS + f"c,{'9' * 5000}\nd,{'9' * 5000}\ne,z\n", "'z'", "once"),
    "JSON list": labeled(JSON_ROWS + '["c", "x"]\n', "line 3", "a list, not an object", name="bad.jsonl"),
    "JSON string": labeled('"a"\n', "line 1", "a str, not an object", name="bad.jsonl"),
    "too many fields": labeled(CSV_ROWS + "a, b,x\n", "line 6: 3 fields where the header has 2"),
    "too few fields": labeled(CSV_ROWS + "a\n", "line 6: 1 field", "header has 2"),
    "open quote": labeled(CSV_ROWS + '"a,x\nb,y\n', "line 6"),
    "stray quote": labeled(CSV_ROWS + '"a"b,x\n', "line 6"),
    "unknown ending": labeled(CSV_ROWS, "'.xlsx'", ".csv, .tsv, .jsonl", name="labeled.xlsx"),
    "no ending": labeled(CSV_ROWS, ".csv, .tsv, .jsonl", name="labeled"),
    "folder without a data set": Bad(
        ("folder", "data set folder"), ("--labeled", "folder"), arrange=lambda _: Path("folder").mkdir()
    ),
    "folder called a file": Bad(("d.csv",), ("--labeled", "d.csv"), arrange=lambda _: Path("d.csv").mkdir()),
    "split of a file": flags("--labeled", "labeled.csv[train]", says=("labeled.csv",)),
    "unknown bundled corpus": flags("--labeled", "bundled:books", says=("bundled:books", "bundled:newswire")),
}

MODELS: dict[str, Bad] = {
    "folder without a model": Bad(
        ("notes", "not a model", "modules.json"), ("--teacher", "notes"), arrange=lambda _: Path("notes").mkdir()
    ),
    "missing folder": flags("--teacher", "./nowhere", says=("There is no model folder", "nowhere")),
    "missing student": flags("--student", "/no/such/model", says=("There is no model folder", "/no/such/model")),
    "file as model": flags("--teacher", "labeled.csv", says=("labeled.csv",)),
    "unknown demo": flags("--teacher", "demo:bert", says=("demo:bert", "demo:all-MiniLM-L6-v2")),
    "cut-off weights": broken_model("--teacher", "model.safetensors", halve),
    "garbled weights": broken_model("--teacher", "model.safetensors", scribble),
    "missing weights": broken_model("--teacher", "model.safetensors", Path.unlink),
    "cut-off weights of the student": broken_model("--student", "model.safetensors", halve),
    "broken config": broken_model("--teacher", "config.json", halve),
    "broken tokenizer": broken_model("--teacher", "tokenizer.json", halve),
    "broken modules": broken_model("--teacher", "modules.json", halve),
    "layer out of range": flags("--student", "layers:0,9", says=("0, 9", "4", "from 0 to 3")),
    "layer twice": flags("--student", "layers:1,1", says=("1, 1",)),
    "layers that are no numbers": flags("--student", "layers:x", says=("'layers:x'", "layers:0,2,5")),
    "no layers": flags("--student", "layers:", says=("'layers:'", "layers:0,2,5")),
}

OUTPUTS: dict[str, Bad] = {
    "output folder is a file": flags("--output-dir", "eval.csv", says=("eval.csv", "is a file", "--output-dir")),
    "output folder is not empty": Bad(("out", "not empty", "--overwrite"), files={"out/mine.txt": "mine"}),
    "output folder below a file": flags("--output-dir", "eval.csv/run", says=("eval.csv is a file", "--output-dir")),
    "output folder far below a file": flags("--output-dir", "eval.csv/a/b/c", says=("eval.csv is a file",)),
    "output folder is a dead link": Bad(
        ("dead",), ("--output-dir", "dead"), arrange=lambda _: Path("dead").symlink_to("nowhere/at/all")
    ),
}

SETTINGS: dict[str, Bad] = {
    "unknown preset": flags("--preset", "imdb", says=("imdb", "ag_news", "newswire")),
    "unknown flag": flags("--lables", "x", says=("--lables", "--labeled")),
    "missing config": flags("--config", "no.yaml", says=("no.yaml", "No such file", "--config")),
    "config is a folder": Bad(("notes", "--config"), ("--config", "notes"), arrange=lambda _: Path("notes").mkdir()),
    "unknown key": config("epoch: 2\n", "epoch", "not a setting", "epochs"),
    "unknown keys": config("epoch: 2\nshot: 3\n", "epoch", "shot"),
    "broken YAML": config("epochs: 2\nshots: [1\n", "settings.yaml", "line"),
    "tab in YAML": config("epochs: 2\n\tshots: 3\n", "settings.yaml, line 2"),
    "list in YAML": config("- epochs\n", "settings.yaml", "name: value"),
    "word in YAML": config("epochs\n", "settings.yaml", "name: value"),
    "config is not UTF-8": config(b"labeled: caf\xe9.csv\n", "settings.yaml", "UTF-8"),
    "word as a number": config("batch_size: many\n", "batch_size", "many"),
    "null as a number": config("alpha:\n", "alpha"),
    "list as a name": config("objective: [pairs]\n", "objective"),
    "shots": flags("--shots", "1", says=("shots", "greater than or equal to 2", "1")),
    "epochs": flags("--epochs", "0", says=("epochs", "greater than or equal to 1", "0")),
    "learning rate": flags("--learning-rate", "5", says=("learning_rate", "less than 1", "5")),
    "learning rate nan": flags("--learning-rate", "nan", says=("learning_rate", "nan")),
    "gold weight infinite": flags("--gold-weight", "inf", says=("gold_weight", "inf")),
    "batch of three": flags("--batch-size", "3", says=("batch_size", "greater than or equal to 4")),
    "negative seed": flags("--seed", "-1", says=("seed", "greater than or equal to 0", "-1")),
    "word for a number": flags("--epochs", "many", says=("--epochs", "many")),
    "objective": flags("--objective", "triplet", says=("objective", "triplet", "similarity", "pairs")),
    "objective without weight": flags("--objective", "similarity=", says=("objective", "no number")),
    "objective of no weight": flags("--objective", "similarity=0", says=("objective", "above 0")),
    "objective twice": flags("--objective", "embedding,embedding=2", says=("objective", "twice")),
    "pairs in company": flags("--objective", "pairs,similarity", says=("objective", "pairs goes alone")),
    "fp16 on a cpu": flags("--precision", "fp16", "--device", "cpu", says=("fp16", "CUDA", "--precision")),
    "micro-batch of none": flags("--micro-batch-size", "0", says=("micro_batch_size", "greater than or equal to 1")),
    "head without strength": flags("--head-c", "0", says=("head_c", "above 0")),
    "head of words": flags("--head-c", "strong", says=("head_c", "auto")),
    "alpha past one": flags("--alpha", "1.5", says=("alpha", "less than or equal to 1")),
    "temperature of none": flags("--temperature", "0", says=("temperature", "greater than or equal to 0.01")),
    "unknown device": flags("--device", "tpu", says=("device", "tpu", "cpu")),
    "device that is not there": flags("--device", "cuda:99", says=("cuda:99", "auto")),
}


@pytest.mark.parametrize(
    "bad", [pytest.param(bad, id=name) for table in (DATA, MODELS, OUTPUTS, SETTINGS) for name, bad in table.items()]
)
def test_bad_input_is_refused(bad: Bad, models: list[str], tiny_teacher: Path, tmp_path: Path) -> None:
    write_good()
    for name, content in bad.files.items():
        path = Path(name)
        if content is None:
            path.unlink()
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    bad.arrange(tiny_teacher)
    before = tree(tmp_path)
    result = invoke_run(*models, *bad.flags)
    assert_refused(result, *bad.says)
    assert tree(tmp_path) == before


def test_good_input_passes(models: list[str], tmp_path: Path) -> None:
    write_good()
    before = tree(tmp_path)
    result = invoke_run(*models, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "steps" in result.stdout
    assert tree(tmp_path) == before


FILES_IN_YAML = "labeled: labeled.csv\nunlabeled: pool.txt\n"


@pytest.mark.parametrize(
    ("sources", "settings", "says"),
    [
        pytest.param(("--labeled", "labeled.csv"), "", ("--unlabeled",), id="no pool"),
        pytest.param(("--labeled", "", "--unlabeled", "pool.txt"), "", ("labeled",), id="nameless labels"),
        pytest.param((), FILES_IN_YAML + "text_column: 5\n", ("text_column", "5"), id="number as columns"),
        pytest.param((), FILES_IN_YAML + "label_column: [a]\n", ("label_column",), id="list as a column"),
        pytest.param((), FILES_IN_YAML + "shots: 1\n", ("shots", "greater than or equal to 2"), id="shots"),
    ],
)
def test_sources_named_badly(
    sources: tuple[str, ...], settings: str, says: tuple[str, ...], models: list[str], tmp_path: Path
) -> None:
    write_good()
    Path("settings.yaml").write_text(settings, encoding="utf-8")
    before = tree(tmp_path)
    flags = ["--config", "settings.yaml", *sources, *models, *QUICK, "--output-dir", "out"]
    assert_refused(CliRunner().invoke(main, ["run", *flags]), *says)
    assert tree(tmp_path) == before


def test_cuda_where_there_is_none(models: list[str], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    write_good()
    assert_refused(invoke_run(*models, "--device", "cuda"), "'cuda'", "--device auto")
    assert not (tmp_path / "out").exists()


def test_fewer_labels_than_shots_is_a_warning(models: list[str]) -> None:
    write_good()
    Path("labeled.csv").write_text(GOOD["labeled.csv"] + "more ants,ants\neven more ants,ants\n", encoding="utf-8")
    result = invoke_run(*models, "--shots", "5", "--dry-run")
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stderr.split())
    assert "Class 'bees' has 4 labeled texts, fewer than 5" in said
    assert "'ants'" not in said


def test_folder_without_permission(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_good()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    before = tree(tmp_path)
    result = invoke_run(*models, "--output-dir", str(tmp_path / "new" / "run"))
    assert_refused(result, str(tmp_path), "cannot be written to", "--output-dir")
    assert tree(tmp_path) == before


def test_read_only_file_system(models: list[str], mount: Callable[[str], Path]) -> None:
    write_good()
    folder = mount("ro,size=64k")
    result = invoke_run(*models, "--output-dir", str(folder / "run"))
    assert_refused(result, str(folder), "cannot be written to", "--output-dir")


WHOLE = {
    "teacher": {"model.safetensors", "modules.json", "head.safetensors", "head.json", "model_head.pkl"},
    "signals": {"signals.json", "texts.jsonl", "probabilities.npy", "embeddings.npy"},
    "evaluation": {"texts.jsonl"},
    "evaluation/teacher": {"measured.json", "probabilities.npy"},
}


def assert_full_disk(result: Result, folder: Path, *, done: set[str]) -> None:
    """The message says that the disk is full, and the folder holds what was done by then, whole, and nothing else."""
    assert_refused(result, str(folder), "The disk is full", "--output-dir")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert names - {"config.yaml", "run.json", "run.log", ".lock"} == {name for name in done if "/" not in name}
    for name in done:
        assert {path.name for path in (folder / name).iterdir()} >= WHOLE[name]


@pytest.mark.parametrize(
    ("free_kb", "done"),
    [
        pytest.param(0, set(), id="at the settings"),
        pytest.param(4, set(), id="at the log"),
        pytest.param(256, {"evaluation"}, id="at the teacher"),
        pytest.param(640, {"teacher", "signals", "evaluation", "evaluation/teacher"}, id="at the student"),
    ],
)
def test_full_disk(free_kb: int, done: set[str], models: list[str], mount: Callable[[str], Path]) -> None:
    write_good()
    folder = mount("size=1m")
    usage = shutil.disk_usage(folder)
    (folder / "ballast").write_bytes(bytes(usage.free - free_kb * 1024))
    result = invoke_run(*models, "--verbose", "--output-dir", str(folder / "run"))
    assert_full_disk(result, folder / "run", done=done)


FULL = {
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
def test_disk_that_fills_up_while_tensors_are_written(
    stage: str, error: str, done: set[str], models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_good()
    tensors_before, rows_before = safetensors.serialize_file, save_rows

    def fail_at_stage(path: Any) -> None:
        if f".{stage}." in str(path):
            Path(path).write_bytes(b"half")
            raise FULL[error]

    def write_tensors(tensors: Any, filename: Any, *rest: Any, **named: Any) -> None:
        fail_at_stage(filename)
        tensors_before(tensors, filename, *rest, **named)

    def write_rows(array: Any, path: Path, **named: Any) -> None:
        fail_at_stage(path)
        rows_before(array, path, **named)

    for module in (safetensors.torch, safetensors.numpy):
        monkeypatch.setattr(module, "serialize_file", write_tensors)
    monkeypatch.setattr("setfit_kd.signals.signals.save_rows", write_rows)
    result = invoke_run(*models, "--output-dir", str(tmp_path / "out"))
    assert_full_disk(result, tmp_path / "out", done=done)


def test_disk_that_fills_up_while_a_file_is_written(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_good()
    original = Path.write_text

    def fail_on_settings(path: Path, *arguments: Any, **named: Any) -> int:
        if not path.name.startswith(".config.yaml."):
            return original(path, *arguments, **named)
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fail_on_settings)
    assert_full_disk(invoke_run(*models), Path("out"), done=set())
    assert set(tree(tmp_path / "out")) == {".lock", "run.json"}


def test_failed_write_keeps_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("metrics.json", {"accuracy": 1})
    before = tree(tmp_path)

    def fail(path: Path, *_: Any, **__: Any) -> int:
        path.touch()
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="quota"):
        folder.write_json("metrics.json", {"accuracy": 0})
    assert tree(tmp_path) == before


def test_an_error_that_hides_a_failed_write_is_not_reported_as_one(tmp_path: Path) -> None:
    def fail() -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise KeyError("no such column") from None

    with pytest.raises(KeyError, match="no such column"), write_errors(tmp_path / "out"):
        fail()
