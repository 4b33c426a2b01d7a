"""Compare the speed of two versions of setfit-kd, in interleaved runs of separate processes.

Run: python benchmarks/speed.py --before COMMIT --data FOLDER [--mpnet FOLDER] [--runs 3] [CASE ...]
The data folder holds train.csv and test.csv with the columns text and label; the mpnet folder holds a model. The other
version is checked out into a temporary folder and runs in the same environment. Run i uses seed i. Cases:
newswire: the demo run
run: 16 labels per class, a pool of 1,000 texts, all-MiniLM-L6-v2 and its layers 0, 2 and 5
static: the same with a static student
score: 10,000 texts with all-MiniLM-L6-v2
mpnet: 2,000 texts with the model in the mpnet folder
pool: 100,000 texts of twelve words with all-MiniLM-L6-v2
steps: a training step of 32 texts in a network that takes almost no time
head: the fit of a head with 150 classes on soft labels of 10,000 texts
predict: one text, with the student of a demo run
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from scale import tiny_body, write_pool

HERE = Path(__file__).parent
DEMO = "demo:all-MiniLM-L6-v2"


def run(scratch: Path, seed: int, data: Path, *options: str) -> dict[str, Any]:
    """Measure a whole run on the command line."""
    few = ["--labeled", data / "train.csv", "--unlabeled", data / "train.csv", "--eval", data / "test.csv"]
    few += ["--shots", 16, "--pool-size", 1000, "--teacher", DEMO]
    arguments = ["--preset", "newswire"] if "newswire" in options else [*few, *options]
    command = [sys.executable, "-m", "setfit_kd", "run", "--output-dir", scratch / "run", "--seed", seed, *arguments]
    seconds = call(command)
    metrics, manifest = (json.loads((scratch / "run" / f"{name}.json").read_text()) for name in ("metrics", "run"))
    accuracy = {name: round(100 * metrics[name]["accuracy"], 2) for name in ("teacher", "baseline", "student")}
    return {"seconds": seconds, "precision": manifest["precision"]["name"], **accuracy}


def call(command: list[Any]) -> float:
    """Run a command; return its wall time."""
    started = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return round(time.perf_counter() - started, 2)


def score(texts: list[str], data: Path, teacher: str | Path = DEMO) -> dict[str, Any]:
    """Measure the scoring of texts with a model that is trained for one step."""
    import pandas as pd

    from setfit_kd import score as score_pool
    from setfit_kd import train_teacher

    labeled = pd.read_csv(data / "train.csv").groupby("label").head(16).to_dict("records")
    model = train_teacher(labeled, str(teacher), teacher_steps=1, precision="fp32", device="cpu")
    started = time.perf_counter()
    score_pool(model, texts)
    return {"seconds": round(time.perf_counter() - started, 2), "texts": len(texts)}


def read_texts(data: Path, n: int) -> list[str]:
    """Read n texts, those of the test file first."""
    import pandas as pd

    texts: list[str] = pd.concat([pd.read_csv(data / f"{name}.csv") for name in ("test", "train")]).text.tolist()
    return texts[:n]


def pool(scratch: Path, data: Path) -> dict[str, Any]:
    """Measure the scoring of a large pool."""
    import pandas as pd

    write_pool(scratch / "pool.parquet", 100_000)
    return score(pd.read_parquet(scratch / "pool.parquet").text.tolist(), data)


def steps(scratch: Path, data: Path) -> dict[str, Any]:
    """Measure training steps of 32 texts with a body of one layer."""
    from setfit_kd import TeacherSignals, train_student

    texts, rng = read_texts(data, 640), np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), len(texts)).astype(np.float32)
    embeddings = rng.normal(size=(len(texts), 64)).astype(np.float32)
    signals, body = TeacherSignals(texts, probabilities, tuple("abcd"), embeddings, "random"), tiny_body(scratch)
    settings: dict[str, Any] = {"precision": "fp32", "device": "cpu", "batch_size": 32}
    seconds = []
    for epochs in (1, 1, 11):  # the first one imports packages
        started = time.perf_counter()
        train_student(signals, body, epochs=epochs, **settings)
        seconds.append(time.perf_counter() - started)
    return {"seconds": round((seconds[2] - seconds[1]) / 200, 4)}


def head(scratch: Path, data: Path) -> dict[str, Any]:
    """Measure the fit of a head with 150 classes on soft labels of 10,000 texts."""
    from setfit_kd.models.heads import fit_head

    rng = np.random.default_rng(0)
    centers, classes = rng.normal(size=(150, 384)), rng.integers(150, size=10_000)
    embeddings = centers[classes] + 1.5 * rng.normal(size=(10_000, 384))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    soft = 0.8 * np.eye(150)[classes] + 0.2 * rng.dirichlet(np.ones(150), 10_000)
    fit_head(embeddings[:9], soft[:9])  # imports packages
    started = time.perf_counter()
    fit_head(embeddings, soft)
    return {"seconds": round(time.perf_counter() - started, 2)}


def predict(scratch: Path, seed: int, data: Path) -> dict[str, Any]:
    """Measure the prediction of one text by the student of a run, in a new process."""
    run(scratch, seed, data, "newswire")
    command = [sys.executable, "-m", "setfit_kd", "predict", scratch / "run", "Rain stops play on the third day"]
    call(command)  # reads the files from the disk
    return {"seconds": call(command)}


CASES: dict[str, Callable[[Path, int, Path, Path | None], dict[str, Any]]] = {
    "newswire": lambda scratch, seed, data, _: run(scratch, seed, data, "newswire"),
    "run": lambda scratch, seed, data, _: run(scratch, seed, data, "--student", "layers:0,2,5"),
    "static": lambda scratch, seed, data, _: run(scratch, seed, data, "--student", "static"),
    "score": lambda scratch, seed, data, _: score(read_texts(data, 10_000), data),
    "mpnet": lambda scratch, seed, data, mpnet: score(read_texts(data, 2000), data, mpnet or DEMO),
    "pool": lambda scratch, seed, data, _: pool(scratch, data),
    "steps": lambda scratch, seed, data, _: steps(scratch, data),
    "head": lambda scratch, seed, data, _: head(scratch, data),
    "predict": lambda scratch, seed, data, _: predict(scratch, seed, data),
}


@click.command()
@click.argument("cases", nargs=-1, type=click.Choice(list(CASES)))
@click.option("--before", required=True, metavar="COMMIT")
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True, resolve_path=True))
@click.option("--mpnet", type=click.Path(path_type=Path, exists=True, resolve_path=True))
@click.option("--runs", default=3, type=click.IntRange(1))
@click.option("--output", default=HERE / "results", type=click.Path(path_type=Path))
@click.option("--worker", hidden=True)
def main(
    cases: tuple[str, ...], before: str, data: Path, mpnet: Path | None, runs: int, output: Path, worker: str
) -> None:
    """Measure the cases, by default all, and write a table; results of other cases are kept."""
    if worker:
        with TemporaryDirectory() as scratch:
            result = CASES[cases[0]](Path(scratch), int(worker), data, mpnet)
        usage = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        click.echo(json.dumps({**result, "peak_mb": round(usage / 1024)}))
        return
    file = output / "speed.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    with TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "--detach", f"{folder}/before", before], cwd=HERE.parent, check=True)
        try:
            for case in cases or [case for case in CASES if mpnet or case != "mpnet"]:
                results[case] = {"before": [], "after": []}
                for seed in range(runs):
                    for version, source in (("before", f"{folder}/before"), ("after", str(HERE.parent))):
                        command = [sys.executable, __file__, case, "--before", before, "--data", data, "--worker", seed]
                        command += ["--mpnet", mpnet] if mpnet else []
                        variables = {
                            **os.environ,
                            "PYTHONPATH": source,
                            "SETFIT_KD_CACHE": f"{folder}/cache-{case}-{seed}-{version}",
                        }
                        process = subprocess.run(
                            list(map(str, command)), env=variables, cwd=folder, check=True, stdout=subprocess.PIPE
                        )
                        results[case][version].append(json.loads(process.stdout.splitlines()[-1]))
                        click.echo(f"{case} {version} {results[case][version][-1]}")
                output.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(results, indent=1) + "\n")
                (output / "speed.md").write_text(table(results, before))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", f"{folder}/before"], cwd=HERE.parent, check=True)


def table(results: dict[str, Any], before: str) -> str:
    """Format the results as Markdown."""
    lines = [
        f"# Speed compared with {before}",
        "",
        f"Wall time in seconds on {os.cpu_count()} cores, median of interleaved runs, and peak memory in MiB, each",
        "before and after. Accuracies are means over the runs, in percent: teacher, baseline, student. The cases are",
        "described in `benchmarks/speed.py`.",
        "",
        "| case | before | after | ratio | memory | memory | training precision | accuracy before | accuracy after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, versions in results.items():
        seconds = [median(cell["seconds"] for cell in cells) for cells in versions.values()]
        memory = [max(cell["peak_mb"] for cell in cells) for cells in versions.values()]
        precision = " / ".join(
            sorted({cell["precision"] for cells in versions.values() for cell in cells if "precision" in cell})
        )
        accuracy = [
            ", ".join(f"{np.mean([cell[name] for cell in cells]):.1f}" for name in ("teacher", "baseline", "student"))
            if "student" in cells[0]
            else ""
            for cells in versions.values()
        ]
        row = [
            case,
            *(f"{value:.3g}" for value in seconds),
            f"{seconds[1] / seconds[0]:.2f}",
            *memory,
            precision,
            *accuracy,
        ]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
