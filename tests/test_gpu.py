"""OOM backoff on a real GPU: randomly initialized mpnet-base with too little GPU memory for its batch.

Run with `make test-gpu`; skipped if no CUDA device is available.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import newswire
from synthetic import weight_distance, weights

from setfit_kd import RunConfig, distill
from setfit_kd.data.labeled_set import draw_shots, encode_labels
from setfit_kd.data.sources import read
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.student.distil import train_student
from setfit_kd.teacher.scoring import refine_and_score
from setfit_kd.teacher.train import train_teacher

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

GIB = 1 << 30
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 20 * GIB,
        reason="no CUDA device with 20 GiB, which the run without errors needs",
    ),
]

SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "teacher_steps": 4,
    "teacher_learning_rate": 1e-4,
    "learning_rate": 1e-4,
    "epochs": 1,
    "max_length": 128,
    "encode_batch_size": 512,
    "cache": False,
}


def mpnet_base(folder: Path, layers: int = 12) -> SentenceTransformer:
    """Create mpnet-base with fixed random weights and the demo model's tokenizer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, MPNetConfig, MPNetModel

    from setfit_kd.models.bodies import locate_model

    torch.manual_seed(0)
    MPNetModel(MPNetConfig(num_hidden_layers=layers)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate_model("demo:all-MiniLM-L6-v2")).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder), max_seq_length=128), Pooling(768)], device="cpu")


@contextmanager
def limited_gpu_memory(gib: float) -> Iterator[None]:
    """Context manager that limits the memory of the process on the first GPU."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), 0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def run(
    folder: Path, gib: float, layers: int = 12, pool_size: int = 128, **settings: Any
) -> tuple[SetFitModel, SetFitModel, list[dict[str, Any]]]:
    """Train a teacher and a student of up to 3 layers with limited GPU memory; return them and the backoff events."""
    labeled = draw_shots(encode_labels(read("bundled:newswire", label_column="label")), 16, seed=0)
    pool = [" ".join([row["text"]] * 4) for row in newswire("train")[:pool_size]]  # long enough to fill 128 tokens
    config = RunConfig.of(device="cuda", **{**SETTINGS, **settings})
    with limited_gpu_memory(gib), shared_backoff() as events:
        teacher = train_teacher(labeled, mpnet_base(folder / "teacher", layers), config=config)
        teacher, signals = refine_and_score(teacher, labeled, pool, config=config)
        teacher.model_body.to("cpu")
        body = mpnet_base(folder / "student", min(layers, 3))
        student = train_student(signals, body, labeled=labeled, config=config)
        student.model_body.to("cpu")
    for event in events:
        print(event)
    return teacher, student, list(events)


def assert_close(actual: SetFitModel, expected: SetFitModel, start: SentenceTransformer) -> None:
    """Check that the weights of two models differ little compared with the total update from the start."""
    update = weight_distance(weights(expected), list(start.state_dict().values()))
    assert update > 0.1
    assert weight_distance(weights(actual), weights(expected)) < 0.05 * update


def test_little_memory_uses_micro_batches(tmp_path: Path) -> None:
    start = {"teacher": mpnet_base(tmp_path / "start"), "student": mpnet_base(tmp_path / "start-3", layers=3)}
    teacher, student, events = run(tmp_path / "large", 64)
    assert not events
    # Weights, gradients and AdamW state of 109 M parameters take 1.8 GB; the activations of a batch do not fit as well.
    small_teacher, small_student, events = run(tmp_path / "small", 2.6)
    assert events
    assert all(event["to"]["device"].startswith("cuda") for event in events)
    assert min(event["to"]["texts"] for event in events if event["kind"] == "training") < 64
    assert_close(small_teacher, teacher, start["teacher"])
    assert_close(small_student, student, start["student"])


def test_very_little_memory_uses_the_cpu(tmp_path: Path) -> None:
    """The weights and gradients of two layers and their embeddings, 300 MB, do not fit."""
    sizes = {"layers": 2, "pool_size": 64, "max_length": 32}
    teacher, student, events = run(tmp_path / "large", 64, **sizes)
    assert not events
    small_teacher, small_student, events = run(tmp_path / "small", 0.25, **sizes)
    assert any(event["to"]["device"] == "cpu" for event in events)
    start = mpnet_base(tmp_path / "start", layers=2)
    assert_close(small_teacher, teacher, start)
    assert_close(small_student, student, start)


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_run_with_very_little_memory_succeeds(tmp_path: Path, precision: str) -> None:
    mpnet_base(tmp_path / "mpnet", layers=3).save_pretrained(str(tmp_path / "body"))
    settings: Any = {**SETTINGS, "precision": precision, "shots": 4, "pool_size": 64, "max_length": 32}
    with limited_gpu_memory(0.25):
        sources: Any = dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")
        models: Any = {"teacher": str(tmp_path / "body"), "student": "layers:0,2", "output_dir": tmp_path / "run"}
        result = distill(**sources, device="cuda", **models, **settings)
    assert result.student.model_body.device.type == "cuda"
    assert set(result.metrics) == {"teacher", "baseline", "student"}
