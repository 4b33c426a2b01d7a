"""Precision of training: resolving `auto`, checking devices, and fp32 models after training."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from conftest import FAST, newswire
from synthetic import QUICK, few_labels, pool_signals

from setfit_kd import distill, load, train_student, train_teacher
from setfit_kd.errors import ConfigError
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.io import save_model
from setfit_kd.training import precision as module
from setfit_kd.training.precision import Precision, check_precision, resolve_precision

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

TEXTS = [row["text"] for row in newswire("eval")[:10]]
CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


@pytest.fixture(autouse=True)
def no_measured_speedups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_measured", {})


def fake_times(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> list[int]:
    """Replace the measurement by these times; return a list that collects the widths of the measured bodies."""
    measured_widths: list[int] = []

    def seconds(body: SentenceTransformer, texts: list[str]) -> tuple[float, float]:
        assert 0 < len(texts) <= 8
        measured_widths.append(body.get_embedding_dimension() or 0)
        return fp32, bf16

    monkeypatch.setattr(module, "_step_seconds", seconds)
    return measured_widths


# Resolving


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"),
    [
        (3.0, 1.0, Precision("bf16", 3.0)),
        (1.1, 1.0, Precision("bf16", 1.1)),
        (1.08, 1.0, Precision("fp32", 1.08)),
        (1.0, 4.0, Precision("fp32", 0.25)),
    ],
)
def test_auto_chooses_bf16_if_it_is_faster(
    student_body: SentenceTransformer, fp32: float, bf16: float, expected: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_times(monkeypatch, fp32, bf16)
    assert resolve_precision("auto", student_body, TEXTS) == expected


def test_each_width_is_measured_once(
    student_body: SentenceTransformer, teacher_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_widths = fake_times(monkeypatch, 2, 1)
    precisions = [resolve_precision("auto", body, TEXTS) for body in (student_body, teacher_body) * 3]
    assert measured_widths == [16, 32]
    assert set(precisions) == {Precision("bf16", 2.0)}


@pytest.fixture
def resolve_in_new_process(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> Callable[[float], str]:
    """Function of a speedup that resolves ``auto`` as in a new process that measures this speedup."""

    def resolve(speedup: float) -> str:
        monkeypatch.setattr(module, "_measured", {})
        fake_times(monkeypatch, speedup, 1)
        return resolve_precision("auto", student_body, TEXTS).name

    return resolve


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "bf16"),
        ("", "fp32"),
        ("[" * 100_000, "fp32"),
        ('["a list"]', "fp32"),
        ('{KEY: 1.5, "another": -1}', "fp32"),
    ],
    ids=str,
)
def test_speedup_is_cached_for_later_processes(
    content: str | None, expected: str, resolve_in_new_process: Callable[[float], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_in_new_process(1.11) == "bf16"
    file = Path(os.environ["SETFIT_KD_CACHE"]) / "precision.json"
    [key] = json.loads(file.read_text())
    if content is not None:
        file.write_text(content.replace("KEY", json.dumps(key)))
    assert resolve_in_new_process(1.09) == expected
    assert resolve_in_new_process(1.11) == expected  # an invalid file was replaced
    assert list(json.loads(file.read_text())) == [key]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert [resolve_in_new_process(speedup) for speedup in (9, 1)] == ["bf16", "bf16"]
    assert len(json.loads(file.read_text())) == 2


def test_unusable_cache_folder_is_ignored(
    resolve_in_new_process: Callable[[float], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SETFIT_KD_CACHE", str(tmp_path / "file"))
    assert [resolve_in_new_process(1.11), resolve_in_new_process(1.09)] == ["bf16", "fp32"]
    monkeypatch.setattr(module, "cache_folder", lambda: None)
    assert [resolve_in_new_process(1.11), resolve_in_new_process(1.09)] == ["bf16", "fp32"]
    assert not caplog.records


def test_fp32_is_chosen_if_bf16_does_not_run(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: Iterator[Exception] = iter(
        [RuntimeError("\"addmm_impl_cpu_\" not implemented for 'BFloat16'"), *[torch.OutOfMemoryError("CUDA")] * 9]
    )

    def fail(*_: Any) -> None:
        raise next(errors)

    monkeypatch.setattr(module, "_step_seconds", fail)
    assert resolve_precision("auto", student_body, TEXTS) == Precision("fp32")
    with pytest.raises(torch.OutOfMemoryError):
        resolve_precision("auto", student_body, TEXTS)


@pytest.mark.parametrize("name", ["fp32", "bf16", "auto"])
def test_precision_is_measured_only_for_auto_and_transformers(
    student_body: SentenceTransformer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    measured_widths = fake_times(monkeypatch, 2, 1)
    body = SentenceTransformer(modules=[BoW(vocab=["a", "b"])], device="cpu") if name == "auto" else student_body
    assert resolve_precision(name, body, TEXTS) == Precision("fp32" if name == "auto" else name)
    assert not measured_widths


def test_measurement_does_not_change_body(student_body: SentenceTransformer) -> None:
    student_body.eval()
    before = {name: value.clone() for name, value in student_body.state_dict().items()}
    precision = resolve_precision("auto", student_body, TEXTS)
    assert precision.speedup is not None
    assert precision.speedup > 0
    assert precision.name in ("fp32", "bf16")
    assert all(torch.equal(value, before[name]) for name, value in student_body.state_dict().items())
    for parameter in student_body.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert parameter.dtype == torch.float32
    assert not student_body.training


@pytest.mark.parametrize(
    ("name", "device", "message"), [("fp16", CPU, "CUDA"), ("fp16", MPS, "CUDA"), ("bf16", MPS, "mps cannot")]
)
def test_unsupported_precision_raises_error(name: str, device: torch.device, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_precision(name, device)


def train_student_in(body: SentenceTransformer | Path, precision: str) -> SetFitModel:
    return train_student(pool_signals(), body, labeled=few_labels(), **{**QUICK, "precision": precision})


def train_teacher_in(body: SentenceTransformer | Path, precision: str) -> SetFitModel:
    settings: dict[str, Any] = {"teacher_steps": 2, "teacher_batch_size": 8, "teacher_learning_rate": 1e-2}
    return train_teacher(few_labels(), body, device="cpu", precision=precision, **settings)


Train = Callable[["SentenceTransformer | Path", str], "SetFitModel"]
STAGES = pytest.mark.parametrize("train", [train_student_in, train_teacher_in], ids=["student", "teacher"])


@STAGES
def test_training_in_unsupported_precision_raises_error(tiny_student: Path, train: Train) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a CUDA device"):
        train(tiny_student, "fp16")


# Training


@contextmanager
def record_dtypes(body: SentenceTransformer) -> Iterator[dict[str, set[torch.dtype]]]:
    """Context manager that yields the output dtypes of a body's linear layers, with and without gradients."""
    dtypes: dict[str, set[torch.dtype]] = {"training": set(), "inference": set()}

    def record(_: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
        dtypes["training" if torch.is_grad_enabled() else "inference"].add(output.dtype)

    hooks = [part.register_forward_hook(record) for part in body.modules() if isinstance(part, torch.nn.Linear)]
    assert hooks
    yield dtypes
    for hook in hooks:
        hook.remove()


@STAGES
@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_applies_only_to_training(
    student_body: SentenceTransformer, tmp_path: Path, train: Train, name: str, dtype: torch.dtype
) -> None:
    before = [parameter.clone() for parameter in student_body.parameters()]
    with record_dtypes(student_body) as dtypes:
        model = train(student_body, name)
    assert dtypes["training"] == {dtype}
    assert dtypes["inference"] == {torch.float32}  # the head is fitted on embeddings in fp32
    assert {parameter.dtype for parameter in student_body.parameters()} == {torch.float32}
    assert not all(map(torch.equal, before, student_body.parameters()))

    with record_dtypes(student_body) as dtypes:
        embeddings, probabilities = student_body.encode(TEXTS), predict_proba(model, TEXTS)
    assert dtypes["inference"] == {torch.float32}
    save_model(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(embeddings, loaded.model_body.encode(TEXTS))
    np.testing.assert_array_equal(probabilities, predict_proba(loaded, TEXTS))


def test_run_records_precision(
    tiny_teacher: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_widths = fake_times(monkeypatch, 3, 1)
    settings = {**FAST, "precision": "auto", "pool_size": 64, "eval": None, "output_dir": tmp_path / "run"}
    result = distill(
        "bundled:newswire", "bundled:newswire", teacher=str(tiny_teacher), student=str(tiny_student), **settings
    )
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["precision"] == {"name": "bf16", "speedup": 3.0}
    assert measured_widths == [32]  # the student uses the teacher's precision
    # The setting remains "auto", so that another machine measures its own speedup.
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"] == "auto"
    assert result.config.precision == "auto"
