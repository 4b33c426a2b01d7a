"""Which numbers are trained in, and that nothing of them stays behind."""

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
from setfit_kd.models import predict_proba, save_model
from setfit_kd.training import precision as module
from setfit_kd.training.precision import Precision, check_precision, resolve_precision

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

TEXTS = [row["text"] for row in newswire("eval")[:10]]
CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_measured", {})


def timed(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> list[int]:
    """Have the probe find these seconds; the dimensions of the bodies that it was asked about."""
    probed: list[int] = []

    def seconds(body: SentenceTransformer, texts: list[str]) -> tuple[float, float]:
        assert 0 < len(texts) <= 8
        probed.append(body.get_embedding_dimension() or 0)
        return fp32, bf16

    monkeypatch.setattr(module, "_step_seconds", seconds)
    return probed


# Choosing


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"),
    [
        (3.0, 1.0, Precision("bf16", 3.0)),
        (1.1, 1.0, Precision("bf16", 1.1)),
        (1.08, 1.0, Precision("fp32", 1.08)),
        (1.0, 4.0, Precision("fp32", 0.25)),
    ],
)
def test_auto_takes_bf16_where_it_is_worth_it(
    student_body: SentenceTransformer, fp32: float, bf16: float, expected: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, fp32, bf16)
    assert resolve_precision("auto", student_body, TEXTS) == expected


def test_a_width_is_probed_once(
    student_body: SentenceTransformer, teacher_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = timed(monkeypatch, 2, 1)
    answers = [resolve_precision("auto", body, TEXTS) for body in (student_body, teacher_body) * 3]
    assert probed == [16, 32]
    assert set(answers) == {Precision("bf16", 2.0)}


@pytest.fixture
def decide(student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], str]:
    """What a new process decides where its probe finds this speedup."""

    def decide(speedup: float) -> str:
        monkeypatch.setattr(module, "_measured", {})
        timed(monkeypatch, speedup, 1)
        return resolve_precision("auto", student_body, TEXTS).name

    return decide


@pytest.mark.parametrize(
    ("damage", "later"),
    [
        (None, "bf16"),
        ("", "fp32"),
        ("[" * 100_000, "fp32"),
        ('["a list"]', "fp32"),
        ('{KEY: "fast"}', "fp32"),
        ("{KEY: NaN}", "fp32"),
        ('{KEY: 1.5, "another": -1}', "fp32"),
    ],
    ids=str,
)
def test_a_decision_is_kept_for_later_processes(
    damage: str | None, later: str, decide: Callable[[float], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decide(1.11) == "bf16"
    file = Path(os.environ["SETFIT_KD_CACHE"]) / "precision.json"
    [key] = json.loads(file.read_text())
    if damage is not None:
        file.write_text(damage.replace("KEY", json.dumps(key)))
    assert decide(1.09) == later
    assert decide(1.11) == later  # what could not be read was replaced
    assert list(json.loads(file.read_text())) == [key]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert decide(9) == "bf16"
    assert decide(1) == "bf16"
    assert len(json.loads(file.read_text())) == 2


def test_a_decision_that_cannot_be_kept_does_not_matter(
    decide: Callable[[float], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SETFIT_KD_CACHE", str(tmp_path / "file"))
    assert [decide(1.11), decide(1.09)] == ["bf16", "fp32"]
    monkeypatch.setattr(module, "cache_folder", lambda: None)
    assert [decide(1.11), decide(1.09)] == ["bf16", "fp32"]
    assert not caplog.records


def test_samples_are_taken_by_turns(student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower while it is probed is as slow for both."""
    clock = iter(range(1, 10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock) ** 2))
    fp32, bf16 = module._step_seconds(student_body, TEXTS)
    assert 0.5 < fp32 / bf16 <= 1


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (RuntimeError("\"addmm_impl_cpu_\" not implemented for 'BFloat16'"), Precision("fp32")),
        (torch.OutOfMemoryError("CUDA out of memory."), None),
    ],
)
def test_where_bf16_does_not_run_it_is_not_taken(
    student_body: SentenceTransformer,
    failure: Exception,
    expected: Precision | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(module, "_step_seconds", fail)
    if expected is None:
        with pytest.raises(torch.OutOfMemoryError):
            resolve_precision("auto", student_body, TEXTS)
    else:
        assert resolve_precision("auto", student_body, TEXTS) == expected


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_precision_asked_for_is_not_probed(
    student_body: SentenceTransformer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = timed(monkeypatch, 2, 1)
    assert resolve_precision(name, student_body, TEXTS) == Precision(name)
    assert not probed


def test_a_body_without_a_transformer_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    probed = timed(monkeypatch, 2, 1)
    body = SentenceTransformer(modules=[BoW(vocab=["a", "b"])], device="cpu")
    assert resolve_precision("auto", body, TEXTS) == Precision("fp32")
    assert not probed


@pytest.mark.parametrize("training", [False, True])
def test_a_real_probe_leaves_the_body_as_it_is(student_body: SentenceTransformer, training: bool) -> None:
    student_body.train(training)
    before = {name: value.clone() for name, value in student_body.state_dict().items()}
    found = resolve_precision("auto", student_body, TEXTS)
    assert found.speedup is not None
    assert found.speedup > 0
    assert found.name in ("fp32", "bf16")
    assert all(torch.equal(value, before[name]) for name, value in student_body.state_dict().items())
    for parameter in student_body.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert parameter.dtype == torch.float32
    assert student_body.training is training


@pytest.mark.parametrize(
    ("name", "device", "says"), [("fp16", CPU, "CUDA"), ("fp16", MPS, "CUDA"), ("bf16", MPS, "mps cannot")]
)
def test_what_a_device_cannot_do_is_refused(name: str, device: torch.device, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_precision(name, device)


@pytest.mark.parametrize("name", ["auto", "fp32", "bf16"])
def test_a_cpu_can_do_all_but_fp16(name: str) -> None:
    check_precision(name, CPU)


def student_of(body: SentenceTransformer | Path, precision: str) -> SetFitModel:
    return train_student(pool_signals(), body, labeled=few_labels(), **{**QUICK, "precision": precision})


def teacher_of(body: SentenceTransformer | Path, precision: str) -> SetFitModel:
    settings: dict[str, Any] = {"teacher_steps": 2, "teacher_batch_size": 8, "teacher_learning_rate": 1e-2}
    return train_teacher(few_labels(), body, device="cpu", precision=precision, **settings)


Train = Callable[["SentenceTransformer | Path", str], "SetFitModel"]
STAGES = pytest.mark.parametrize("train", [student_of, teacher_of], ids=["student", "teacher"])


@STAGES
@pytest.mark.parametrize(("name", "says"), [("fp16", "fp16 needs a CUDA device"), ("fp8", "fp8")])
def test_a_precision_that_cannot_be_is_refused(tiny_student: Path, train: Train, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        train(tiny_student, name)


# Training


@contextmanager
def computed_in(body: SentenceTransformer) -> Iterator[dict[str, set[torch.dtype]]]:
    """The types of what a body's linear layers give out, with and without a gradient."""
    seen: dict[str, set[torch.dtype]] = {"training": set(), "running": set()}

    def record(_: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
        seen["training" if torch.is_grad_enabled() else "running"].add(output.dtype)

    hooks = [part.register_forward_hook(record) for part in body.modules() if isinstance(part, torch.nn.Linear)]
    assert hooks
    yield seen
    for hook in hooks:
        hook.remove()


@STAGES
@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_training_computes_in_its_precision_and_nothing_after_does(
    student_body: SentenceTransformer, tmp_path: Path, train: Train, name: str, dtype: torch.dtype
) -> None:
    before = [parameter.clone() for parameter in student_body.parameters()]
    with computed_in(student_body) as seen:
        model = train(student_body, name)
    assert seen["training"] == {dtype}
    assert seen["running"] == {torch.float32}  # the head is fitted on what the finished body says
    assert {parameter.dtype for parameter in student_body.parameters()} == {torch.float32}
    assert not all(map(torch.equal, before, student_body.parameters()))

    with computed_in(student_body) as seen:
        here = student_body.encode(TEXTS), predict_proba(model, TEXTS)
    assert seen["running"] == {torch.float32}
    save_model(model, tmp_path / "saved")
    again = load(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(here[0], again.model_body.encode(TEXTS))
    np.testing.assert_array_equal(here[1], predict_proba(again, TEXTS))


@STAGES
def test_half_precision_learns_nearly_the_same(tiny_student: Path, train: Train) -> None:
    one, other = (predict_proba(train(tiny_student, name), pool_signals().texts) for name in ("fp32", "bf16"))
    assert 0 < np.abs(one - other).max() < 0.25


def test_a_run_records_what_it_was_trained_in(
    tiny_teacher: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = timed(monkeypatch, 3, 1)
    settings = {**FAST, "precision": "auto", "pool_size": 64, "eval": None, "output_dir": tmp_path / "run"}
    result = distill(
        "bundled:newswire", "bundled:newswire", teacher=str(tiny_teacher), student=str(tiny_student), **settings
    )
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["precision"] == {"name": "bf16", "speedup": 3.0}
    assert probed == [32]  # the student is trained as the teacher was
    # The settings stay as they were given: another machine finds its own.
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"] == "auto"
    assert result.config.precision == "auto"
