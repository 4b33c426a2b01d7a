"""Tests of ``setfit-kd predict`` with an output folder: every row once, and nothing that is finished twice."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from fsspec.implementations.memory import MemoryFileSystem
from predictions import predict_ok, run_predict
from synthetic import QUICK, texts_and_labels

import setfit_kd
from setfit_kd.errors import DataError
from setfit_kd.scale import parts as parts_module
from setfit_kd.signals.files import read_signals

TEXTS = texts_and_labels(40)[0]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Folder with four files of JSON lines, one of them in a subfolder."""
    folder = tmp_path / "pool"
    for number, name in enumerate(("a.jsonl", "b.jsonl", "c.jsonl", "more/d.jsonl")):
        write_lines(folder / name, number)
    return folder


def write_lines(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": 100 * number + i, "text": text} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(*paths: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def outputs(folder: Path | str = "out") -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*") if path.suffix in (".jsonl", ".parquet"))


def times(folder: Path | str = "out") -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def predict_pool(model: Path, pool: Path, *arguments: str) -> Result:
    return predict_ok(model, "--input", f"{pool}/**/*.jsonl", "--output", "out/", *arguments)


def test_shards_together_give_the_predictions_of_one_command(bundle: Path, pool: Path) -> None:
    files = sorted(pool.rglob("*.jsonl"))
    predict_ok(bundle, *(argument for file in files for argument in ("-i", str(file))), "--output", "all.jsonl")
    for shard in ("1/3", "0/3", "2/3"):
        result = predict_pool(bundle, pool, "--shard", shard)
    assert result.stdout.startswith("1 files done, 0 skipped, 0 failed; 40 rows in ")
    assert [str(path) for path in outputs()] == ["out/a.jsonl", "out/b.jsonl", "out/c.jsonl", "out/more/d.jsonl"]
    assert read_rows(*outputs()) == read_rows(Path("all.jsonl"))
    for path in outputs():
        manifest = json.loads(path.with_name(f"{path.name}.manifest.json").read_text(encoding="utf-8"))
        assert manifest["rows_in"] == manifest["rows_out"] == len(TEXTS)
        assert manifest["output_size"] == path.stat().st_size


def test_only_what_is_not_finished_is_classified(bundle: Path, pool: Path, tmp_path: Path) -> None:
    model = shutil.copytree(bundle, tmp_path / "model")
    predict_pool(model, pool)
    before = times()
    assert predict_pool(model, pool).stdout.startswith("0 files done, 4 skipped, 0 failed; 0 rows")
    assert times() == before
    write_lines(pool / "b.jsonl", 7)
    Path("out/c.jsonl").write_text("cut off", encoding="utf-8")
    assert predict_pool(model, pool).stdout.startswith("2 files done, 2 skipped")
    changed = {str(path) for path, time in times().items() if before[path] != time}
    assert {path for path in changed if path.endswith("l")} == {"out/b.jsonl", "out/c.jsonl"}
    assert read_rows(Path("out/b.jsonl"))[0]["id"] == 700
    assert predict_pool(model, pool, "--threshold", "0.999").stdout.startswith("4 files done")
    assert {row["label"] for row in read_rows(*outputs())} == {None}
    (model / "labels.txt").write_text("changed", encoding="utf-8")
    assert predict_pool(model, pool, "--threshold", "0.999").stdout.startswith("4 files done")


def test_interrupted_part_leaves_no_output(bundle: Path, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[Any]:
        yield []
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts_module, "classify", interrupted)
        assert run_predict(bundle, "--input", f"{pool}/b.jsonl", "--output", "out/").exit_code == 130
    assert times() == {}
    Path("out/.b.jsonl.0123abcd").write_text("of a killed process", encoding="utf-8")
    predict_ok(bundle, "--input", f"{pool}/b.jsonl", "--output", "out/")
    assert {path.name for path in times()} == {"b.jsonl", "b.jsonl.manifest.json"}


def test_bad_part_does_not_stop_the_others(bundle: Path, pool: Path) -> None:
    (pool / "b.jsonl").write_text('{"text": "fine"}\n{"text": "cut', encoding="utf-8")
    pq.write_table(pa.table({"text": TEXTS}), pool / "e.parquet")
    (pool / "f.parquet").write_bytes((pool / "e.parquet").read_bytes()[:-9])
    (pool / "g.txt").write_bytes(b"")
    with pq.ParquetWriter(pool / "h.parquet", (empty := pa.table({"text": pa.array([], pa.string())})).schema) as file:
        file.write_table(empty)
    result = run_predict(bundle, "--input", f"{pool}/*", "--output", "out/")
    assert result.exit_code == 2
    assert f"{pool}/b.jsonl, line 2: not valid JSON" in result.stderr
    assert f"Failed: {pool}/b.jsonl, {pool}/f.parquet." in result.stderr
    assert result.stdout.startswith("5 files done, 0 skipped, 2 failed; 120 rows")
    assert [path.name for path in outputs()] == ["a.jsonl", "c.jsonl", "e.parquet", "g.jsonl", "h.parquet"]
    assert pq.read_table("out/h.parquet").num_rows == 0


def test_row_groups_are_parts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "ROWS_PER_PART", 60)
    table = pa.table({"id": range(100), "text": [*TEXTS, *TEXTS[:29], None, *TEXTS[:30]]})
    Path("in").mkdir()
    pq.write_table(table, "in/t.parquet", row_group_size=30)
    predict_ok(bundle, "--input", "in/t.parquet", "--output", "all.parquet")
    result = predict_ok(bundle, "--input", "in/*.parquet", "--output", "out/")
    assert f"{Path('in/t.parquet').absolute()}, row 70: no text" in result.stderr
    assert [path.name for path in outputs()] == ["t.rows-001-060.parquet", "t.rows-061-100.parquet"]
    assert pa.concat_tables(map(pq.read_table, outputs())).equals(pq.read_table("all.parquet"))


def test_files_on_a_remote_file_system(bundle: Path, pool: Path) -> None:
    memory = fsspec.filesystem("memory")
    pq.write_table(pa.table({"text": TEXTS}), "t.parquet")
    try:
        memory.put(f"{pool}/", "/pool/", recursive=True)
        memory.put_file("t.parquet", "/pool/t.parquet")
        memory.pipe_file("/pool/bad.csv", b'text\n"x')
        memory.pipe_file("/pool/z.csv.gz", gzip.compress(b"text\nfine\n"))
        arguments = ["--input", "memory://pool/*", "--output", "memory://out/"]
        result = run_predict(bundle, *arguments)
        assert "Error: memory:///pool/bad.csv: bad.csv, line 2: unexpected end of data." in result.stderr
        assert "Failed: memory:///pool/bad.csv." in result.stderr
        assert json.loads(memory.cat_file("/out/z.jsonl"))["text"] == "fine"
        predict_ok(bundle, "--input", "t.parquet", "--output", "all.parquet")
        assert pq.read_table("/out/t.parquet", filesystem=memory).equals(pq.read_table("all.parquet"))
        predict_ok(bundle, "--input", f"{pool}/a.jsonl", "--output", "a.jsonl")
        assert memory.cat_file("/out/a.jsonl") == Path("a.jsonl").read_bytes()
        assert not memory.exists("/out/bad.jsonl")
        memory.rm_file("/pool/bad.csv")
        assert predict_ok(bundle, *arguments).stdout.startswith("0 files done, 5 skipped")
    finally:
        MemoryFileSystem.store.clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "no/*.csv", "--output", "out/"], "No such file: no/*.csv."),
        (
            ["--input", "nothing://x/*.csv", "--output", "out/"],
            "Cannot list nothing://x/*.csv, or write to out/ (Protocol not known",
        ),
        (["--input", "pool/*.jsonl", "--output", "out.jsonl"], "need --input and an output folder"),
        (["--input", "pool/*.jsonl", "--output", "pool"], "is in the folder of the outputs"),
        (["--input", "pool/[ab].*", "--output", "out/"], "have the same output"),
        (["--input", "pool/a.jsonl", "--output", "out/", "--shard", "2/2"], "expected I/N with 0 <= I < N"),
        (["--input", "pool/a.jsonl", "--output", "out/", "--workers", "2"], "--workers is for --engine ray"),
        (["--input", "pool/a.jsonl", "--output", "memory://out/a.csv"], "need --input and an output folder"),
        (["--input", "pool/a.jsonl", "--output", "out/", "--pair-column", "b"], "classifies single texts"),
        (["--input", "pool/a.jsonl", "--output", "out/", "--embeddings"], "Only SetFit models have embeddings"),
        (["--shard", "0/2", "a text"], "need --input and an output folder"),
    ],
)
def test_invalid_arguments_are_explained(arguments: list[str], message: str, bundle: Path, pool: Path) -> None:
    (pool / "a.csv").write_text("text\nx\n", encoding="utf-8")
    result = run_predict(bundle, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not Path("out").exists()


def test_student_of_many_signal_files_is_that_of_one(models: dict[str, Path], pool: Path, tiny_student: Path) -> None:
    predict_pool(models["setfit"], pool, "--embeddings", "--exact")
    Path("one.jsonl").write_bytes(b"".join(path.read_bytes() for path in outputs()))
    one, *many = (read_signals(name) for name in ("one.jsonl", "out", "out/**/*.jsonl"))
    students = [setfit_kd.train_student(signals, tiny_student, **QUICK) for signals in (one, *many)]
    expected, *others = [student.predict_proba(TEXTS).tolist() for student in students]
    assert others == [expected, expected]
    scored = setfit_kd.score(setfit_kd.load(models["setfit"], device="cpu"), one.texts, exact=True, cache=False)
    assert one.embeddings == pytest.approx(scored.embeddings, abs=1e-5)
    table = pa.table({"text": one.texts, "embedding": [0] * len(one.texts)})
    pq.write_table(table, "in.parquet")
    predict_ok(models["setfit"], "-i", "in.parquet", "-o", "two.parquet", "--embeddings", "--exact")
    assert read_signals("two.parquet").embeddings == pytest.approx(scored.embeddings, abs=1e-5)
    Path("bad").mkdir()
    write_lines(Path("bad/a.jsonl"), 0)
    with pytest.raises(DataError, match=r"bad/a.jsonl has the columns 'id', 'text'"):
        read_signals("bad")
