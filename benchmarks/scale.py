"""Measure CPU time and peak memory for growing pools, each in a separate process.

Run: python benchmarks/scale.py [--sizes 1000,10000,100000] [--signals-only 1000000]
Each text of the pool has twelve random words of the bundled news corpus. The pool is streamed from a Parquet file. For
--sizes, all stages run with real models, and the student trains for one epoch. For --signals-only, the pool is read,
sampled and scored by a random teacher with one layer.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

HERE = Path(__file__).parent
WORDS_PER_TEXT = 12


@click.command()
@click.option("--sizes", default="1000,10000,100000", help="Pool sizes for all stages.")
@click.option("--signals-only", default="1000000", help="Pool sizes for reading, sampling and scoring only.")
@click.option("--threads", default=1, type=click.IntRange(1))
@click.option("--output", default=HERE / "results", type=click.Path(path_type=Path))
def main(sizes: str, signals_only: str, threads: int, output: Path) -> None:
    """Measure and write a table."""
    jobs = [("run", int(n)) for n in sizes.split(",") if n] + [
        ("signals", int(n)) for n in signals_only.split(",") if n
    ]
    cells: list[dict[str, Any]] = []
    for kind, n in jobs:
        with TemporaryDirectory(prefix="setfit-kd-") as scratch:
            variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
            environment = {**os.environ, **variables, "TOKENIZERS_PARALLELISM": "false", "TMPDIR": scratch}
            command = [sys.executable, __file__, "--worker", kind, str(n), scratch]
            process = subprocess.run(command, env=environment, capture_output=True, text=True)
            if process.returncode:
                raise click.ClickException(f"{kind} {n} failed:\n{process.stderr[-3000:]}")
            cells.append(json.loads(process.stdout.splitlines()[-1]))
            click.echo(cells[-1])
    output.mkdir(parents=True, exist_ok=True)
    (output / "scale.json").write_text(json.dumps(cells, indent=1) + "\n")
    (output / "scale.md").write_text(table(cells, threads))


def table(cells: list[dict[str, Any]], threads: int) -> str:
    """Format the results as Markdown."""
    lines = [
        "# Time and memory against the size of the pool",
        "",
        f"CPU seconds on {threads} of {os.cpu_count()} cores; texts of {WORDS_PER_TEXT} words. Complete runs use",
        "all-MiniLM-L6-v2 and its layers 0, 2 and 5, and the student trains for one epoch. In rows without a student,",
        "the pool is only read, sampled and scored, by a random teacher with one layer.",
        "",
        "| pool | reading, s | signals, s | student, s | peak memory, MiB | of that before the pool, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        student = f"{cell['student']:.0f}" if "student" in cell else ""
        lines.append(
            f"| {cell['pool']:,} | {cell['reading']:.1f} | {cell['signals']:.0f} | {student} | {cell['peak_mb']:,} "
            f"| {cell['before_mb']:,} |"
        )
    return "\n".join(lines) + "\n"


def write_pool(path: Path, n: int) -> None:
    """Write a Parquet file of n texts in chunks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from setfit_kd.data.sources import read

    vocabulary = np.array(sorted({word for text in read("bundled:newswire").texts for word in text.split()}))
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        for start in range(0, n, 10_000):
            words = vocabulary[rng.integers(0, len(vocabulary), (min(10_000, n - start), WORDS_PER_TEXT))]
            writer.write_table(pa.table({"text": [" ".join(row) for row in words]}))


def tiny_body(folder: Path) -> Any:
    """Create a random body with one layer of width 128 and the demo model's tokenizer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    from setfit_kd.models.bodies import locate_body

    tokenizer = AutoTokenizer.from_pretrained(locate_body("demo:all-MiniLM-L6-v2").folder)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 256,
    }
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return SentenceTransformer(
        modules=[Transformer(str(folder / "tiny"), max_seq_length=64), Pooling(128)], device="cpu"
    )


def peak_mb() -> int:
    """Return the peak resident size of the process in MiB, including memory-mapped pages."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(kind: str, n: int, scratch: Path) -> dict[str, Any]:
    """Measure the stages with a pool of n texts."""
    from setfit_kd import RunConfig, train_student, train_teacher
    from setfit_kd.models.bodies import load_body, locate_model
    from setfit_kd.models.layers import cut_layers
    from setfit_kd.run.inputs import load_run_data
    from setfit_kd.teacher.scoring import refine_and_score

    write_pool(scratch / "pool.parquet", n)
    config = RunConfig.of(
        labeled="bundled:newswire",
        unlabeled=str(scratch / "pool.parquet"),
        shots=16,
        pool_size=n,
        epochs=1,
        encode_batch_size=64,
        device="cpu",
        cache=False,
    )
    small = RunConfig.of(**{**config.model_dump(), "unlabeled": "bundled:newswire", "pool_size": 64})
    labeled = load_run_data(small).labeled
    body = tiny_body(scratch) if kind == "signals" else load_body(locate_model("demo:all-MiniLM-L6-v2"))
    student = None if kind == "signals" else cut_layers(body, (0, 2, 5))
    teacher = train_teacher(labeled, body, config=config)
    cell: dict[str, Any] = {"pool": n, "before_mb": peak_mb()}
    started = time.process_time()
    data = load_run_data(config)
    cell["reading"] = round(time.process_time() - started, 2)
    started = time.process_time()
    _, signals = refine_and_score(teacher, data.labeled, data.pool, config=config)
    cell["signals"] = round(time.process_time() - started, 2)
    if student is not None:
        started = time.process_time()
        train_student(signals, student, labeled=data.labeled, config=config)
        cell["student"] = round(time.process_time() - started, 2)
    else:
        from setfit_kd.losses.pairs import draw_pairs
        from setfit_kd.losses.similarity import SimilarityLoss

        assert signals.embeddings is not None
        draw_pairs(signals.embeddings, pairs_per_text=1, seed=0)
        import torch

        objective = SimilarityLoss(torch.nn.Identity(), signals.embeddings)
        rng = np.random.default_rng(0)
        for _ in range(1000):
            objective.compute_loss([torch.ones(32, 8)], torch.as_tensor(rng.integers(0, n, 32)))
    return {**cell, "peak_mb": peak_mb()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))))
    else:
        main()
