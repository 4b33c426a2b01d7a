"""Out-of-memory errors, OOM backoff, and equal results with and without errors."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import FAST
from synthetic import QUICK, equal_weights, few_labels, pool_signals, weight_distance, weights
from torch import Tensor

from setfit_kd import distill, evaluate, load, score, train_student, train_teacher
from setfit_kd.errors import ConfigError, ModelError, OutOfMemoryError, OutputError
from setfit_kd.export.bundle import export_bundle
from setfit_kd.memory import backoff as backoff_module
from setfit_kd.memory import devices
from setfit_kd.memory.backoff import Attempt, BackoffEvent, OOMBackoff, shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.memory.oom_errors import is_out_of_memory
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import embed, predict_proba
from setfit_kd.models.io import save_model
from setfit_kd.models.layers import cut_layers
from setfit_kd.runtime.classify import Classifier

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CPU = torch.device("cpu")


def oom_error(size: str = "2.00 GiB") -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size}.\nMore details.")


# Recognizing out-of-memory errors


class OnnxError(Exception):
    __module__ = "onnxruntime.capi.onnxruntime_pybind11_state"


def chained(error: Exception, *, cause: Exception | None = None, context: Exception | None = None) -> Exception:
    """Return an error as from ``raise error from cause``, or as raised while handling ``context``."""
    if context is not None:
        error.__context__ = context
    if cause is not None:
        error.__cause__ = cause
    return error


def suppressed(error: Exception, context: Exception) -> Exception:
    """Return an error as from ``raise error from None`` while handling ``context``."""
    try:
        try:
            raise context
        except Exception:
            raise error from None
    except Exception as raised:
        return raised


OOM_ERRORS = [
    oom_error(),
    MemoryError(),
    MemoryError("Unable to allocate 74.5 GiB for an array with shape (100000, 100000) and data type float64"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    *map(
        RuntimeError,
        (
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous one.",
            "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
            "HIP out of memory. Tried to allocate 20.00 MiB",
            "MPS backend out of memory (MPS allocated: 17.64 GB, max allowed: 18.13 GB).",
            "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8",
            "[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: not enough memory: you tried to allocate 8",
            "std::bad_alloc",
        ),
    ),
    OnnxError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 8"),
    OutOfMemoryError("Training teacher: out of memory."),
    chained(RuntimeError("the trainer failed"), cause=oom_error()),
    chained(ValueError("batch 3"), context=chained(RuntimeError("step 7"), cause=RuntimeError("MPS out of memory"))),
    chained(ModelError("The model does not load."), cause=oom_error()),
]
OTHER_ERRORS = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (32x384 and 768x4)"),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed."),
    RuntimeError("Trying to backward through the graph a second time"),
    KeyError("CUDA out of memory"),
    ValueError("row 3: the label 'CUDA out of memory' is not among the teacher's"),
    OSError(errno.ENOSPC, "No space left on device"),
    OutputError("Cannot write runs/out of memory: No space left on device"),
    ConfigError("Unknown device: 'error: out of memory'."),
    IndexError("index out of range in self"),
    OnnxError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Unexpected input data type."),
    suppressed(ValueError("no such label"), oom_error()),
    KeyboardInterrupt(),
    SystemExit(1),
]


@pytest.mark.parametrize("error", OOM_ERRORS, ids=repr)
def test_out_of_memory_errors_are_recognized(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER_ERRORS, ids=repr)
def test_other_errors_are_not_recognized(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_circular_causes_end() -> None:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__context__, second.__context__ = second, first
    assert not is_out_of_memory(first)


# Devices


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as an accelerator, so that the CPU fallback applies."""
    monkeypatch.setattr(backoff_module, "_is_accelerator", lambda _: True)


def test_auto_resolves_to_first_working_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "_available_accelerators", lambda: ["cuda", "mps"])
    unsupported = RuntimeError("CUDA error: no kernel image\nMore details.")
    monkeypatch.setattr(devices, "_probe_device", lambda device: unsupported if device.type == "cuda" else None)
    assert resolve_device("auto") == torch.device("mps")
    assert caplog.messages == ["Cannot use device cuda: CUDA error: no kernel image"]
    with pytest.raises(ConfigError, match="Cannot use device 'cuda': CUDA error: no kernel image"):
        resolve_device("cuda")
    monkeypatch.setattr(devices, "_probe_device", lambda _: oom_error())
    assert resolve_device("auto") == CPU
    assert resolve_device("cuda") == torch.device("cuda")  # full, but requested by name: the backoff handles it


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_missing_device_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_available_accelerators", list)
    with pytest.raises(ConfigError, match=f"Device '{name}' is not available"):
        resolve_device(name)


def test_device_probe_allocates_memory() -> None:
    assert devices._probe_device(CPU) is None
    assert "meta" in str(devices._probe_device(torch.device("meta")))


def test_free_memory_is_less_than_total_memory() -> None:
    free, total = devices.free_memory(CPU)
    assert 0 < free < total


# OOMBackoff alone


def make_backoff(
    *, kind: str, device: torch.device = CPU, batch_size: int, model: torch.nn.Module | None = None
) -> OOMBackoff:
    return OOMBackoff("Phase", kind=kind, device=device, batch_size=batch_size, model=model or torch.nn.Linear(2, 2))


@pytest.fixture
def no_cuda_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow attempts on CUDA devices that do not exist."""
    monkeypatch.setattr(backoff_module, "clear_cache", lambda _: None)
    monkeypatch.setattr(backoff_module, "_free_bytes", lambda _: None)


def run_failing(
    *, failures: int, device: str = "cpu", batch_size: int = 4, step: int | None = 1, **settings: Any
) -> tuple[list[Attempt], list[BackoffEvent]]:
    """Run a phase whose first attempts fail; return all attempts and the events."""
    attempts: list[Attempt] = []

    def fail_first(attempt: Attempt) -> None:
        attempts.append(attempt)
        if len(attempts) <= failures:
            raise oom_error()

    with shared_backoff(**settings) as events:
        backoff = make_backoff(kind="training", device=torch.device(device), batch_size=batch_size)
        backoff.step = step
        backoff.run(fail_first)
    return attempts, events


@pytest.mark.usefixtures("no_cuda_calls")
@pytest.mark.parametrize("failures", range(7))
def test_attempts_are_a_retry_then_halved_sizes_then_the_cpu(failures: int) -> None:
    gpu = torch.device("cuda:1")
    expected = [
        Attempt(gpu, 4),
        Attempt(gpu, 4),
        Attempt(gpu, 2),
        Attempt(gpu, 1),
        Attempt(CPU, 4),
        Attempt(CPU, 2),
        Attempt(CPU, 1),
    ]
    attempts, events = run_failing(failures=failures, device="cuda:1")
    assert attempts == expected[: failures + 1]
    assert [event.before for event in events] == attempts[:-1]
    assert [event.after for event in events] == attempts[1:]


def test_odd_sizes_end_at_one() -> None:
    attempts, _ = run_failing(failures=4, batch_size=11)
    assert [attempt.batch_size for attempt in attempts] == [11, 11, 5, 2, 1]


@pytest.mark.usefixtures("no_cuda_calls")
@pytest.mark.parametrize("cpu_fallback", [True, False])
def test_final_error_lists_all_attempts(cpu_fallback: bool) -> None:
    with pytest.raises(OutOfMemoryError) as raised:
        run_failing(failures=99, device="cuda", cpu_fallback=cpu_fallback)
    assert "batch size 4, 2, 1 on cuda" in raised.value.message
    assert ("batch size 4, 2, 1 on cpu" in raised.value.message) is cpu_fallback
    assert ("on cpu" in raised.value.message) is cpu_fallback
    assert ("--cpu-fallback" in (raised.value.hint or "")) is not cpu_fallback
    for flag in ("--max-length", "--gradient-checkpointing"):
        assert flag in (raised.value.hint or "")
    assert raised.value.exit_code == 71


@pytest.mark.parametrize("kind", ["encoding", "loading"])
def test_hints_depend_on_the_phase(kind: str) -> None:
    with pytest.raises(OutOfMemoryError) as raised, shared_backoff(cpu_fallback=False):
        make_backoff(kind=kind, batch_size=1).run(Faults(*range(9)).wrap(print))
    assert "checkpointing" not in (raised.value.hint or "")
    assert "--cpu-fallback" not in (raised.value.hint or "")  # the device was the CPU
    assert ("batch size 1 on cpu" in raised.value.message) is (kind == "encoding")


@pytest.mark.usefixtures("no_cuda_calls")
def test_failure_before_first_step_does_not_halve_batches() -> None:
    attempts, _ = run_failing(failures=2, device="cuda", step=None)
    assert list(map(str, attempts)) == ["batch size 4 on cuda"] * 2 + ["batch size 4 on cpu"]


@pytest.mark.parametrize("error", [ValueError("CUDA out of memory"), RuntimeError("shapes"), KeyboardInterrupt()])
def test_other_errors_are_not_retried(error: BaseException) -> None:
    calls = []

    def fail(attempt: Attempt) -> None:
        calls.append(attempt)
        raise error

    with shared_backoff() as events, pytest.raises(type(error)) as raised:
        make_backoff(kind="training", batch_size=4).run(fail)
    assert raised.value is error
    assert (len(calls), events) == (1, [])


def test_tensors_of_failed_attempt_are_freed_before_the_next() -> None:
    references: list[weakref.ref[Tensor]] = []

    def fail_three_times(_: Attempt) -> str:
        assert all(tensor() is None for tensor in references)
        activations = torch.zeros(3)
        references.append(weakref.ref(activations))
        cycle: list[Any] = [activations]
        cycle.append(cycle)
        if len(references) < 4:
            raise chained(RuntimeError("the step failed"), cause=oom_error())
        return "done"

    gc.disable()
    try:
        assert make_backoff(kind="encoding", batch_size=4).run(fail_three_times) == "done"
    finally:
        gc.enable()


def initial_batch_size(model: torch.nn.Module, *, kind: str = "training", batch_size: int = 8) -> int:
    return make_backoff(kind=kind, batch_size=batch_size, model=model).attempt.batch_size


def test_later_phases_start_from_known_limits() -> None:
    small, medium, large = (torch.nn.Linear(n, n) for n in (2, 3, 4))

    def fail_above_two(attempt: Attempt) -> None:
        if attempt.batch_size > 2:
            raise oom_error()

    with shared_backoff():
        backoff = make_backoff(kind="training", batch_size=8, model=medium)
        backoff.step = 1
        backoff.run(fail_above_two)
        assert [initial_batch_size(model) for model in (small, medium, large)] == [8, 2, 2]
        assert initial_batch_size(large, kind="encoding") == 8
        assert initial_batch_size(large, batch_size=1) == 1
        with shared_backoff(cpu_fallback=False):
            assert initial_batch_size(large) == 2
    assert initial_batch_size(large) == 8


@pytest.mark.usefixtures("accelerator", "no_cuda_calls")
def test_model_that_only_fit_on_the_cpu_starts_there() -> None:
    attempts: list[Attempt] = []

    def fail_on_cuda(attempt: Attempt) -> None:
        attempts.append(attempt)
        if attempt.device.type == "cuda":
            raise oom_error()

    model = torch.nn.Linear(3, 3)
    with shared_backoff():
        for _ in range(2):
            backoff = make_backoff(kind="training", device=torch.device("cuda"), batch_size=2, model=model)
            backoff.step = 1
            backoff.run(fail_on_cuda)
    assert [str(attempt.device) for attempt in attempts] == ["cuda", "cuda", "cuda", "cpu", "cpu"]
    assert attempts[-1] == Attempt(CPU, 2)


@pytest.mark.usefixtures("no_cuda_calls")
def test_limit_of_small_model_does_not_move_large_model_back_to_device() -> None:
    """The large model falls back to the CPU; then the small model fits on the device with a smaller batch."""
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(9, 9)
    cuda = torch.device("cuda")

    def fail_on_cuda_above(max_size: int) -> Callable[[Attempt], None]:
        def run(attempt: Attempt) -> None:
            if attempt.device == cuda and attempt.batch_size > max_size:
                raise oom_error()

        return run

    def initial_attempt(model: torch.nn.Module) -> Attempt:
        return make_backoff(kind="encoding", device=cuda, batch_size=16, model=model).attempt

    with shared_backoff():
        for model, max_size in ((large, 0), (small, 4)):
            make_backoff(kind="encoding", device=cuda, batch_size=16, model=model).run(fail_on_cuda_above(max_size))
        assert initial_attempt(small) == Attempt(cuda, 4)
        assert initial_attempt(large) == Attempt(CPU, 16)
        with shared_backoff(cpu_fallback=False):
            assert initial_attempt(large) == Attempt(cuda, 1)
            with shared_backoff(cpu_fallback=True):
                assert initial_attempt(large) == Attempt(cuda, 1)


def test_each_event_is_logged_on_one_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([100 << 20, 300 << 20] * 2)
    monkeypatch.setattr(backoff_module, "_free_bytes", lambda _: next(free))
    _, events = run_failing(failures=2)
    assert [record.getMessage() for record in caplog.records] == [
        "Phase, step 1: out of memory on cpu (100 MiB free, 300 MiB after clearing the cache); retrying.",
        "Phase, step 1: out of memory on cpu (100 MiB free, 300 MiB after clearing the cache); "
        "continuing with batch size 2 instead of 4.",
    ]
    assert json.loads(json.dumps(events[1].as_dict())) == {
        "phase": "Phase",
        "kind": "training",
        "step": 1,
        "cause": "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "from": {"device": "cpu", "texts": 4},
        "to": {"device": "cpu", "texts": 2},
        "free_mb_before": 100,
        "free_mb_after": 300,
    }


# Training, encoding and loading


class Faults:
    """Wrapper of functions that raises out-of-memory errors in certain calls, counted from 1."""

    def __init__(self, *failing_calls: int) -> None:
        self.failing_calls = set(failing_calls)
        self.calls = 0
        self.tensors: list[weakref.ref[Tensor]] = []

    def wrap(self, function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            assert all(tensor() is None for tensor in self.tensors)
            fails = self.calls in self.failing_calls
            result = function(*args, **kwargs) if after or not fails else None
            if fails:
                activations = torch.zeros(5, requires_grad=True) * 2  # only the failed attempt refers to it
                self.tensors.append(weakref.ref(activations))
                raise oom_error()
            return result

        return wrapped


def make_student(body: Path | SentenceTransformer, **settings: Any) -> Any:
    settings = {**QUICK, "learning_rate": 1e-3, "epochs": 2, "batch_size": 8, **settings}
    return train_student(pool_signals(), body, labeled=few_labels(), **settings)


def make_teacher(body: Path | SentenceTransformer, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"device": "cpu", "precision": "fp32", "teacher_steps": 8, "teacher_batch_size": 8}
    return train_teacher(few_labels(), body, **defaults, teacher_learning_rate=1e-3, **settings)


SOFT_LABELS: dict[str, Any] = {"dropout": False, "objective": "soft-labels", "temperature": 1, "learning_rate": 1e-4}


def make_transformer_student(body: Path, **settings: Any) -> Any:
    return make_student(Path(f"transformer:{body}"), **{**SOFT_LABELS, **settings})


def make_transformer_teacher(body: Path, **settings: Any) -> Any:
    return make_teacher(Path(f"transformer:{body}"), **{"teacher_dropout": False, **settings})


WITH_FITTED_HEAD: dict[str, Callable[..., Any]] = {"student": make_student, "teacher": make_teacher}
"""Trainings that fit the head after the body."""
TRAININGS = {
    **WITH_FITTED_HEAD,
    "transformer student": make_transformer_student,
    "transformer teacher": make_transformer_teacher,
}
STEPS = 8
FIRST, MIDDLE, LAST, TWICE, DOWN_TO_ONE = (1,), (4,), (8,), (3, 4), (2, 3, 4, 5)
"""Calls that fail. A failed call is repeated, so the second fault in a row hits the retry."""


def assert_weights_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for actual_tensor, expected_tensor in zip(actual, expected, strict=True):
        torch.testing.assert_close(actual_tensor, expected_tensor, atol=1e-5, rtol=0)


def replace_training_step(monkeypatch: pytest.MonkeyPatch, replace: Callable[[Any], Any]) -> None:
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "training_step", replace(Trainer.training_step))


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize(
    ("failing_calls", "sizes"),
    [(FIRST, [8]), (MIDDLE, [8]), (LAST, [8]), (TWICE, [8, 4]), (DOWN_TO_ONE, [8, 4, 2, 1])],
    ids=["first", "middle", "last", "twice", "down to one"],
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after the backward pass"])
def test_failed_step_is_retried_with_equal_weights(
    tiny_student: Path,
    training: str,
    failing_calls: tuple[int, ...],
    sizes: list[int],
    after: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = weights(TRAININGS[training](tiny_student))
    faults = Faults(*failing_calls)
    replace_training_step(monkeypatch, lambda step: faults.wrap(step, after=after))
    with shared_backoff() as events:
        trained = weights(TRAININGS[training](tiny_student))
    assert faults.calls > STEPS
    assert [event.after.batch_size for event in events] == sizes
    assert {event.step for event in events} == {failing_calls[0]}
    assert_weights_close(trained, expected)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("failing_calls", [FIRST, MIDDLE, LAST, TWICE], ids=["first", "middle", "last", "twice"])
def test_failed_optimizer_step_restarts_the_phase(
    tiny_student: Path, training: str, failing_calls: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the weights may have been updated by then."""
    expected = weights(TRAININGS[training](tiny_student))
    faults = Faults(*failing_calls)
    monkeypatch.setattr(torch.optim.AdamW, "step", faults.wrap(torch.optim.AdamW.step, after=True))
    with shared_backoff() as events:
        trained = weights(TRAININGS[training](tiny_student))
    assert len(events) == len(failing_calls)
    assert faults.calls > STEPS + failing_calls[0] - 1
    assert_weights_close(trained, expected)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("training", TRAININGS)
def test_training_falls_back_to_the_cpu(tiny_student: Path, training: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights(TRAININGS[training](tiny_student))
    faults = Faults(3, 4, 5, 6, 7)
    replace_training_step(monkeypatch, faults.wrap)
    with shared_backoff() as events:
        trained = TRAININGS[training](tiny_student)
    assert [event.after.batch_size for event in events] == [8, 4, 2, 1, 8]
    assert faults.calls == 7 + STEPS  # two completed steps are repeated
    assert_weights_close(weights(trained), expected)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("training", TRAININGS)
def test_error_without_cpu_fallback_lists_attempts(
    tiny_student: Path, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_training_step(monkeypatch, Faults(*range(3, 99)).wrap)
    message = rf"Training {training.split()[-1]}, step 3: .* batch size 8, 4, 2, 1 on cpu"
    with pytest.raises(OutOfMemoryError, match=message):
        TRAININGS[training](tiny_student, cpu_fallback=False)


@pytest.mark.parametrize("training", WITH_FITTED_HEAD)
def test_failed_encoding_for_the_head_does_not_repeat_training(
    tiny_student: Path, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_encoding_faults(monkeypatch, Faults(*range(1, 99)))
    steps = Faults()
    replace_training_step(monkeypatch, steps.wrap)
    with pytest.raises(OutOfMemoryError, match="Fitting head: out of memory with batch size 32, 16, 8, 4, 2, 1"):
        TRAININGS[training](tiny_student)
    assert steps.calls == STEPS


@pytest.mark.parametrize("training", WITH_FITTED_HEAD)
def test_failed_head_fit_does_not_repeat_training(
    student_body: SentenceTransformer, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [value.clone() for value in student_body.state_dict().values()]

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 74.5 GiB")

    monkeypatch.setattr(f"setfit_kd.{training}.trainer.fit_head", fail)
    steps = Faults()
    replace_training_step(monkeypatch, steps.wrap)
    with shared_backoff() as events, pytest.raises(OutOfMemoryError, match=r"head.*74\.5 GiB") as raised:
        WITH_FITTED_HEAD[training](student_body)
    assert steps.calls == STEPS
    assert events == []
    assert "fewer texts" in (raised.value.hint or "")
    assert equal_weights(before, list(student_body.state_dict().values()))


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("error", [ValueError("no such row"), KeyboardInterrupt()])
def test_other_errors_end_training(
    tiny_student: Path, training: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise error

    replace_training_step(monkeypatch, lambda _: fail)
    with pytest.raises(type(error)):
        TRAININGS[training](tiny_student)
    assert len(calls) == 1


def test_failed_half_precision_training_restores_the_body(
    student_body: SentenceTransformer, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(*range(2, 99))
    monkeypatch.setattr(torch.optim.AdamW, "step", faults.wrap(torch.optim.AdamW.step))
    with pytest.raises(OutOfMemoryError):
        train_student(pool_signals(), student_body, **{**QUICK, "precision": "bf16"})
    twin = load_body(tiny_student)
    twin.load_state_dict(student_body.state_dict())
    np.testing.assert_array_equal(embed(student_body, ["match goal"]), embed(twin, ["match goal"]))  # not in bf16
    assert not student_body.training
    assert all(parameter.grad is None for parameter in student_body.parameters())


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize(("max_size", "final_size"), [(5, 4), (1, 1)])
def test_batch_is_split_until_it_fits(
    tiny_student: Path, training: str, max_size: int, final_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised in the forward pass and in the recomputation during the backward pass."""
    from setfit_kd.losses.base import BatchLoss

    expected = weights(TRAININGS[training](tiny_student))
    encode = BatchLoss._encode

    def limited(self: BatchLoss, features: dict[str, Tensor]) -> Tensor:
        if len(features["input_ids"]) > max_size:
            raise oom_error()
        return encode(self, features)

    monkeypatch.setattr(BatchLoss, "_encode", limited)
    with shared_backoff() as events:
        assert_weights_close(weights(TRAININGS[training](tiny_student)), expected)
    assert events[-1].after.batch_size == final_size
    assert {event.step for event in events} == {1}


@pytest.mark.parametrize("training", TRAININGS)
def test_error_in_recomputation_is_handled(tiny_student: Path, training: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from setfit_kd.losses.base import BatchLoss

    expected = weights(TRAININGS[training](tiny_student))
    # A step on 8 texts encodes two micro-batches of 4, and each again in the backward pass.
    faults = Faults(3, 8)
    monkeypatch.setattr(BatchLoss, "_encode", faults.wrap(BatchLoss._encode))
    assert_weights_close(weights(TRAININGS[training](tiny_student, micro_batch_size=4)), expected)
    assert faults.calls > 4 * STEPS


@pytest.mark.parametrize("training", TRAININGS)
def test_trainer_is_freed_before_the_next_one_is_created(
    tiny_student: Path, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer's state is twice the size of the model."""
    references: list[weakref.ref[Any]] = []
    step, calls = torch.optim.AdamW.step, []

    def fail(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            [state, *_] = optimizer.state.values()
            [parameter, *_] = optimizer.state
            references.extend(map(weakref.ref, (optimizer, state["exp_avg"], parameter.grad)))
            raise oom_error()
        assert all(reference() is None for reference in references)
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    gc.disable()
    try:
        TRAININGS[training](tiny_student)
    finally:
        gc.enable()
    assert len(calls) == 3 + STEPS
    assert len(references) == 3


@pytest.mark.parametrize("training", WITH_FITTED_HEAD)
def test_finished_training_frees_the_optimizer(
    tiny_student: Path, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    references: list[weakref.ref[Any]] = []
    step = torch.optim.AdamW.step

    def record_state(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(optimizer, *args, **kwargs)
        [state, *_] = optimizer.state.values()
        references[:] = [weakref.ref(state["exp_avg"])]
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", record_state)

    def checked_embed(*args: Any, **kwargs: Any) -> Any:
        assert references[0]() is None
        return embed(*args, **kwargs)

    monkeypatch.setattr(f"setfit_kd.{training}.trainer.embed", checked_embed)  # called to fit the head
    TRAININGS[training](tiny_student)
    assert references


@pytest.mark.parametrize("training", WITH_FITTED_HEAD)
def test_failed_training_restores_the_weights(
    student_body: SentenceTransformer, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [value.clone() for value in student_body.state_dict().values()]
    replace_training_step(monkeypatch, Faults(*range(4, 99)).wrap)
    with pytest.raises(OutOfMemoryError):
        WITH_FITTED_HEAD[training](student_body)
    assert equal_weights(before, list(student_body.state_dict().values()))


def inject_encoding_faults(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr(SentenceTransformer, "encode", faults.wrap(SentenceTransformer.encode))


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setfit_kd.models.encode._CHUNK", 7)


def test_encoding_reduces_batch_size(student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import SentenceTransformer

    texts = pool_signals().texts
    expected = embed(student_body, texts)
    encode: Any = SentenceTransformer.encode

    def limited(self: SentenceTransformer, *args: Any, batch_size: int, **kwargs: Any) -> Any:
        if batch_size > 3:
            raise oom_error()
        return encode(self, *args, batch_size=batch_size, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode", limited)
    np.testing.assert_allclose(embed(student_body, texts), expected, atol=1e-6)


def test_speed_excludes_failed_attempts(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_teacher(tiny_student)
    faults = Faults(2, 3)
    inject_encoding_faults(monkeypatch, faults)
    evaluation = evaluate(model, few_labels())
    assert faults.calls == 1 + 3 + 1  # the warm-up, the attempts, and a timed repetition
    assert evaluation.cost.device == "cpu"


@pytest.mark.usefixtures("short_chunks", "accelerator")
@pytest.mark.parametrize(
    ("failing_calls", "sizes"),
    [(FIRST, [4]), (MIDDLE, [4]), ((5,), [4]), ((2, 3), [4, 2]), ((2, 3, 4, 5), [4, 2, 1, 4])],
    ids=["first", "middle", "last", "twice", "to the CPU"],
)
def test_encoding_continues_after_the_last_batch(
    student_body: SentenceTransformer, failing_calls: tuple[int, ...], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = pool_signals().texts  # 33: five chunks
    expected = embed(student_body, texts, batch_size=4)
    faults = Faults(*failing_calls)
    inject_encoding_faults(monkeypatch, faults)
    with shared_backoff() as events:
        embeddings = embed(student_body, texts, batch_size=4, description="Scoring pool")
    assert [event.after.batch_size for event in events] == sizes
    assert {(event.phase, event.step) for event in events} == {("Scoring pool", 7 * (failing_calls[0] - 1) or None)}
    assert faults.calls == 5 + len(failing_calls)
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)


def test_failed_evaluation_step_is_retried(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"patience": 9, "epochs": 2}
    expected = weights(make_student(tiny_student, **settings))
    faults = Faults(1, 2)
    inject_encoding_faults(monkeypatch, faults)
    assert_weights_close(weights(make_student(tiny_student, **settings)), expected)
    assert faults.calls == 2 + 2 + 1  # faults, evaluation steps, head


@pytest.mark.parametrize("phase", ["scoring", "evaluation", "prediction", "fitting the head", "export"])
def test_encoding_phases_recover(
    tiny_student: Path, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labeled, texts = few_labels(), pool_signals().texts

    def run_phase() -> Any:
        model = make_teacher(tiny_student)
        if phase == "scoring":
            return score(model, texts).probabilities
        if phase == "prediction":
            return predict_proba(model, texts)
        if phase == "evaluation":
            return evaluate(model, labeled).probabilities
        if phase == "export":
            bundle = export_bundle(model, tmp_path / f"bundle-{next(numbers)}", texts=texts, format="onnx")
            return Classifier(bundle.path).predict_proba(texts)
        return model.model_head.coef_

    numbers = itertools.count()
    expected = run_phase()
    failing_call = {"scoring": 2, "evaluation": 3, "prediction": 2, "fitting the head": 1, "export": 2}[phase]
    inject_encoding_faults(monkeypatch, Faults(failing_call))
    with shared_backoff() as events:
        np.testing.assert_allclose(run_phase(), expected, atol=1e-5)
    assert len(events) == 1


@pytest.mark.usefixtures("accelerator")
def test_model_that_does_not_fit_is_loaded_on_the_cpu(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(make_teacher(tiny_student), tmp_path / "model")
    body = load_body(tmp_path / "model")
    monkeypatch.setattr(body, "to", Faults(1, 2).wrap(body.to))
    monkeypatch.setattr("setfit_kd.models.io.load_body", lambda _: body)
    with shared_backoff() as events:
        model = load(tmp_path / "model", device="cpu")
    assert [event.phase for event in events] == ["Loading model"] * 2
    assert model.predict_proba(["match goal"]).shape == (1, 4)


# Whole runs


@pytest.fixture
def small_run(tiny_teacher: Path, tmp_path: Path) -> Callable[..., Any]:
    """Function that runs the pipeline in a named folder."""

    def run(name: str, **settings: Any) -> Any:
        defaults = {**FAST, "pool_size": 64, "shots": 4, "cache": False, "precision": "fp32"}
        return distill(
            *("bundled:newswire", "bundled:newswire", "bundled:newswire"),
            teacher=str(tiny_teacher),
            student="layers:1",
            output_dir=tmp_path / name,
            **{**defaults, **settings},
        )

    return run


def test_run_with_faults_equals_run_without(
    small_run: Callable[..., Any], tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = small_run("without")
    assert json.loads((tmp_path / "without" / "run.json").read_text())["out_of_memory"] == []
    steps, encodings = Faults(1, 4, 5, 9), Faults(1, 3, 4, 8)
    replace_training_step(monkeypatch, steps.wrap)
    inject_encoding_faults(monkeypatch, encodings)
    result = small_run("with")
    # Rounding errors accumulate over three stages and Adam amplifies small gradients, so compare with the total update.
    start = list(cut_layers(load_body(tiny_teacher), (0,)).state_dict().values())
    update = weight_distance(weights(expected.student), start)
    assert weight_distance(weights(result.student), weights(expected.student)) < 0.01 * update
    # The prediction may change for a text near a decision boundary.
    assert result.metrics["student"]["accuracy"] == pytest.approx(expected.metrics["student"]["accuracy"], abs=0.011)
    events = json.loads((tmp_path / "with" / "run.json").read_text())["out_of_memory"]
    assert len(events) == 8
    assert {"Training teacher", "Training student"} <= {event["phase"] for event in events}


def test_max_length_applies_to_teacher_and_student(small_run: Callable[..., Any]) -> None:
    result = small_run("short", max_length=9)
    for model in (result.teacher, result.student):
        assert model.model_body.max_seq_length == 9
        long, truncated = model.model_body.encode(["one two three four " * 9, "one two three four " * 3])
        np.testing.assert_allclose(long, truncated, atol=1e-5)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_gradient_checkpointing_does_not_change_weights(
    tiny_student: Path, training: str, micro_batch_size: int | None
) -> None:
    plain, checkpointed = (
        TRAININGS[training](tiny_student, gradient_checkpointing=enabled, micro_batch_size=micro_batch_size)
        for enabled in (False, True)
    )
    assert_weights_close(weights(checkpointed), weights(plain))
    layers = checkpointed.model_body[0].auto_model.base_model.encoder.layer
    assert not any("forward" in vars(layer) for layer in layers)


def test_gradient_checkpointing_does_not_store_activations_of_layers(student_body: SentenceTransformer) -> None:
    from setfit_kd.models.layers import checkpointed_layers

    def n_saved_values() -> int:
        saved: list[Tensor] = []

        def save(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        features = student_body.preprocess(["some words of a text"] * 4)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            student_body(features)["sentence_embedding"].sum()
        return sum(tensor.numel() for tensor in saved)

    plain = n_saved_values()
    with checkpointed_layers(student_body):
        assert n_saved_values() < plain / 2


def test_checkpointing_a_body_without_layers_logs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    from setfit_kd.models.layers import checkpointed_layers

    with checkpointed_layers(SentenceTransformer(modules=[BoW(vocab=["a", "b"])], device="cpu")):
        pass
    assert "no transformer layers" in caplog.text
