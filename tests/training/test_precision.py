"""Precision of training: resolving `auto`, checking devices, and fp32 models after training."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from conftest import FAST, newswire
from synthetic import QUICK, few_labels, pool_signals

from setfit_kd import distill, train_student, train_teacher
from setfit_kd.errors import ConfigError
from setfit_kd.training import precision as module
from setfit_kd.training.precision import Precision, check_precision, resolve_precision

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

TEXTS = [row["text"] for row in newswire("eval")[:10]]


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


@pytest.mark.parametrize(("fp32", "expected"), [(1.1, Precision("bf16", 1.1)), (1.08, Precision("fp32", 1.08))])
def test_auto_measures_each_width_once_and_chooses_bf16_if_it_is_faster(
    student_body: Any, teacher_body: Any, fp32: float, expected: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_widths = fake_times(monkeypatch, fp32, 1)
    assert {resolve_precision("auto", body, TEXTS) for body in (student_body, teacher_body) * 2} == {expected}
    assert measured_widths == [16, 32]


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
    ("content", "expected"), [(None, "bf16"), ('["a list"]', "fp32"), ('{KEY: 1.5, "another": -1}', "fp32")]
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
    resolve_in_new_process: Callable[[float], str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Path("file").touch()
    monkeypatch.setenv("SETFIT_KD_CACHE", "file")
    assert [resolve_in_new_process(1.11), resolve_in_new_process(1.09)] == ["bf16", "fp32"]
    monkeypatch.setattr(module, "cache_folder", lambda: None)
    assert [resolve_in_new_process(1.11), resolve_in_new_process(1.09)] == ["bf16", "fp32"]
    assert not caplog.records


def test_fp32_is_chosen_if_bf16_cannot_be_measured(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [RuntimeError("not implemented for 'BFloat16'"), *[torch.OutOfMemoryError("CUDA")] * 9]
    monkeypatch.setattr(module, "_step_seconds", Mock(side_effect=errors))
    for _ in range(2):
        assert resolve_precision("auto", student_body, TEXTS) == Precision("fp32")


def test_precision_is_measured_only_for_auto_and_transformers(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    measured_widths = fake_times(monkeypatch, 2, 1)
    bag_of_words = SentenceTransformer(modules=[BoW(vocab=["a", "b"])], device="cpu")
    assert resolve_precision("auto", bag_of_words, TEXTS) == Precision("fp32")
    assert resolve_precision("bf16", student_body, TEXTS) == Precision("bf16")
    assert not measured_widths


def test_measurement_does_not_change_body(student_body: SentenceTransformer) -> None:
    student_body.eval()
    before = {name: value.clone() for name, value in student_body.state_dict().items()}
    precision = resolve_precision("auto", student_body, TEXTS)
    assert precision.speedup is not None
    assert all(torch.equal(value, before[name]) for name, value in student_body.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student_body.parameters())
    assert not student_body.training


Train = Callable[[Any, str], "SetFitModel"]


def train_student_in(body: Any, precision: str) -> SetFitModel:
    return train_student(pool_signals(), body, labeled=few_labels(), **{**QUICK, "precision": precision})


def train_teacher_in(body: Any, precision: str) -> SetFitModel:
    return train_teacher(few_labels(), body, device="cpu", precision=precision, teacher_steps=2, teacher_batch_size=8)


STAGES = pytest.mark.parametrize("train", [train_student_in, train_teacher_in], ids=["student", "teacher"])


@STAGES
def test_unsupported_precision_raises_error(tiny_student: Path, train: Train) -> None:
    with pytest.raises(ConfigError, match="mps cannot"):
        check_precision("bf16", torch.device("mps"))
    with pytest.raises(ConfigError, match="fp16 needs a CUDA device"):
        train(tiny_student, "fp16")


# Training


@pytest.mark.parametrize(
    ("precision", "limit", "uses_flash"), [("bf16", 1 << 19, False), ("bf16", 100, True), ("fp32", 1 << 19, True)]
)
def test_short_texts_in_bf16_on_a_cpu_are_trained_without_flash_attention(
    precision: str, limit: int, uses_flash: bool, student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled = list[bool]()
    is_flash_enabled: Any = torch.backends.cuda.flash_sdp_enabled
    monkeypatch.setattr(module, "_MAX_ATTENTION_WEIGHTS", limit)

    def record(*_: Any) -> None:
        if torch.is_grad_enabled():
            enabled.append(is_flash_enabled())

    student_body[0].register_forward_hook(record)
    train_teacher_in(student_body, precision)
    assert set(enabled) == {uses_flash}


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
    student_body: SentenceTransformer, train: Train, name: str, dtype: torch.dtype
) -> None:
    with record_dtypes(student_body) as dtypes:
        train(student_body, name)
    assert dtypes["training"] == {dtype}
    assert dtypes["inference"] == {torch.float32}  # the head is fitted on embeddings in fp32
    assert {parameter.dtype for parameter in student_body.parameters()} == {torch.float32}


def test_run_records_precision(tiny_teacher: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_widths = fake_times(monkeypatch, 3, 1)
    settings = {**FAST, "precision": "auto", "pool_size": 64, "eval": None, "output_dir": "run"}
    distill(*["bundled:newswire"] * 2, teacher=str(tiny_teacher), student=str(tiny_student), **settings)
    assert json.loads(Path("run/run.json").read_text())["precision"] == {"name": "bf16", "speedup": 3.0}
    assert measured_widths == [32]  # the student uses the teacher's precision
    # The setting remains "auto", so that another machine measures its own speedup.
    assert yaml.safe_load(Path("run/config.yaml").read_text())["precision"] == "auto"
