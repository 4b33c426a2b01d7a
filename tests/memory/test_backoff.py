"""Out of memory: what it looks like, the way down, and that what comes out is the same."""

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
from synthetic import QUICK, distance, few_labels, pool_signals, same, weights
from torch import Tensor

from setfit_kd import distill, evaluate, load, score, train_student, train_teacher
from setfit_kd.errors import ConfigError, ModelError, OutOfMemoryError, OutputError
from setfit_kd.export import export_bundle
from setfit_kd.memory import (
    Attempt,
    BackoffEvent,
    OOMBackoff,
    devices,
    is_out_of_memory,
    resolve_device,
    shared_backoff,
)
from setfit_kd.memory import backoff as backoff
from setfit_kd.models import cut_layers, embed, load_body, predict_proba, save_model
from setfit_kd.runtime import Classifier

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CPU = torch.device("cpu")


def no_memory(size: str = "2.00 GiB") -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size}.\nMore about it.")


# What it looks like


class OnnxError(Exception):
    __module__ = "onnxruntime.capi.onnxruntime_pybind11_state"


def linked(error: Exception, *, cause: Exception | None = None, context: Exception | None = None) -> Exception:
    """As ``raise error from cause``, or as raised while handling ``context``."""
    if context is not None:
        error.__context__ = context
    if cause is not None:
        error.__cause__ = cause
    return error


def hidden(error: Exception, context: Exception) -> Exception:
    """As ``raise error from None`` while handling ``context``."""
    try:
        try:
            raise context
        except Exception:
            raise error from None
    except Exception as raised:
        return raised


MEMORY = [
    no_memory(),
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
    OutOfMemoryError("Training teacher: memory ran out."),
    linked(RuntimeError("the trainer failed"), cause=no_memory()),
    linked(ValueError("batch 3"), context=linked(RuntimeError("step 7"), cause=RuntimeError("MPS out of memory"))),
    linked(ModelError("The model does not load."), cause=no_memory()),
]
OTHER = [
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
    ConfigError("'error: out of memory' is no device."),
    IndexError("index out of range in self"),
    OnnxError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Unexpected input data type."),
    hidden(ValueError("no such label"), no_memory()),
    KeyboardInterrupt(),
    SystemExit(1),
]


@pytest.mark.parametrize("error", MEMORY, ids=repr)
def test_out_of_memory_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_nothing_else_is_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_a_ring_of_causes_is_gone_through_once() -> None:
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__context__, two.__context__ = two, one
    assert not is_out_of_memory(one)


# Devices


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for a device that another one could take over from."""
    monkeypatch.setattr(backoff, "_is_accelerator", lambda _: True)


def test_auto_takes_the_first_device_that_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "_accelerators", lambda: ["cuda", "mps"])
    too_old = RuntimeError("CUDA error: no kernel image\nMore about it.")
    monkeypatch.setattr(devices, "_obstacle", lambda device: too_old if device.type == "cuda" else None)
    assert resolve_device("auto") == torch.device("mps")
    assert caplog.messages == ["The device cuda cannot be used: CUDA error: no kernel image"]
    with pytest.raises(ConfigError, match="'cuda' cannot be used: CUDA error: no kernel image"):
        resolve_device("cuda")
    monkeypatch.setattr(devices, "_obstacle", lambda _: no_memory())
    assert resolve_device("auto") == CPU
    assert resolve_device("cuda") == torch.device("cuda")  # full, but asked for: that is for the backoff


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_what_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_accelerators", list)
    with pytest.raises(ConfigError, match=f"There is no device '{name}' here"):
        resolve_device(name)


def test_a_device_is_tried_by_a_real_allocation() -> None:
    assert devices._obstacle(CPU) is None
    assert "meta" in str(devices._obstacle(torch.device("meta")))


def test_free_memory_is_part_of_all() -> None:
    free, total = devices.free_memory(CPU)
    assert 0 < free < total


# The backoff by itself


def way_down(
    *, fails: int, device: str = "cpu", size: int = 4, step: int | None = 1, **settings: Any
) -> tuple[list[Attempt], list[BackoffEvent]]:
    """The rungs that were tried by a phase whose first attempts fail, and what it has to tell."""
    tried: list[Attempt] = []

    def attempt(rung: Attempt) -> None:
        tried.append(rung)
        if len(tried) <= fails:
            raise no_memory()

    with shared_backoff(**settings) as events:
        phase = OOMBackoff(
            "Phase", kind="training", device=torch.device(device), size=size, model=torch.nn.Linear(2, 2)
        )
        phase.step = step
        phase.run(attempt)
    return tried, events


@pytest.mark.parametrize("fails", range(7))
def test_the_rungs_are_the_cache_then_halves_then_the_cpu(fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "clear_cache", lambda _: None)
    monkeypatch.setattr(backoff, "_free", lambda _: None)
    gpu = torch.device("cuda:1")
    whole = [
        Attempt(gpu, 4),
        Attempt(gpu, 4),
        Attempt(gpu, 2),
        Attempt(gpu, 1),
        Attempt(CPU, 4),
        Attempt(CPU, 2),
        Attempt(CPU, 1),
    ]
    tried, events = way_down(fails=fails, device="cuda:1")
    assert tried == whole[: fails + 1]
    assert [event.before for event in events] == tried[:-1]
    assert [event.after for event in events] == tried[1:]


def test_odd_sizes_end_at_one() -> None:
    tried, _ = way_down(fails=4, size=11)
    assert [rung.size for rung in tried] == [11, 11, 5, 2, 1]


@pytest.mark.parametrize(("allowed", "says"), [(True, "4, 2, 1 texts at once on cpu$"), (False, "--cpu-fallback")])
def test_after_the_last_rung_all_that_was_tried_is_told(
    allowed: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backoff, "clear_cache", lambda _: None)
    monkeypatch.setattr(backoff, "_free", lambda _: None)
    with pytest.raises(OutOfMemoryError) as raised:
        way_down(fails=99, device="cuda", cpu_fallback=allowed)
    assert "4, 2, 1 texts at once on cuda" in raised.value.message
    assert ("on cpu" in raised.value.message) is allowed
    assert ("--cpu-fallback" in (raised.value.hint or "")) is not allowed
    for remedy in ("--max-length", "--gradient-checkpointing"):
        assert remedy in (raised.value.hint or "")
    assert raised.value.exit_code == 71


@pytest.mark.parametrize("kind", ["encoding", "loading"])
def test_remedies_are_those_of_the_phase(kind: str) -> None:
    with pytest.raises(OutOfMemoryError) as raised, shared_backoff(cpu_fallback=False):
        OOMBackoff("Phase", kind=kind, device=CPU, size=1, model=torch.nn.Linear(2, 2)).run(
            Faults(*range(9)).wrap(print)
        )
    assert "checkpointing" not in (raised.value.hint or "")
    assert "--cpu-fallback" not in (raised.value.hint or "")  # it was the CPU already
    assert ("1 texts at once on cpu" in raised.value.message) is (kind == "encoding")


def test_what_failed_before_the_first_step_needs_no_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "clear_cache", lambda _: None)
    monkeypatch.setattr(backoff, "_free", lambda _: None)
    tried, _ = way_down(fails=2, device="cuda", step=None)
    assert [str(rung) for rung in tried] == ["4 texts at once on cuda"] * 2 + ["4 texts at once on cpu"]


@pytest.mark.parametrize("error", [ValueError("CUDA out of memory"), RuntimeError("shapes"), KeyboardInterrupt()])
def test_another_error_passes_at_once(error: BaseException) -> None:
    calls = []

    def attempt(rung: Attempt) -> None:
        calls.append(rung)
        raise error

    with shared_backoff() as events, pytest.raises(type(error)) as raised:
        OOMBackoff("Phase", kind="training", device=CPU, size=4, model=torch.nn.Linear(2, 2)).run(attempt)
    assert raised.value is error
    assert (len(calls), events) == (1, [])


def test_a_failed_attempt_is_dead_before_the_next() -> None:
    dead: list[weakref.ref[Tensor]] = []

    def attempt(_: Attempt) -> str:
        assert all(tensor() is None for tensor in dead)
        activations = torch.zeros(3)
        dead.append(weakref.ref(activations))
        cycle: list[Any] = [activations]
        cycle.append(cycle)
        if len(dead) < 4:
            raise linked(RuntimeError("the step failed"), cause=no_memory())
        return "done"

    gc.disable()
    try:
        assert (
            OOMBackoff("Phase", kind="encoding", device=CPU, size=4, model=torch.nn.Linear(2, 2)).run(attempt) == "done"
        )
    finally:
        gc.enable()


def start_of(model: torch.nn.Module, *, kind: str = "training", size: int = 8) -> int:
    return OOMBackoff("Phase", kind=kind, device=CPU, size=size, model=model).attempt.size


def test_what_worked_is_where_later_phases_begin() -> None:
    small, middle, large = (torch.nn.Linear(n, n) for n in (2, 3, 4))

    def attempt(rung: Attempt) -> None:
        if rung.size > 2:
            raise no_memory()

    with shared_backoff():
        trained = OOMBackoff("Phase", kind="training", device=CPU, size=8, model=middle)
        trained.step = 1
        trained.run(attempt)
        assert [start_of(model) for model in (small, middle, large)] == [8, 2, 2]
        assert start_of(large, kind="encoding") == 8
        assert start_of(large, size=1) == 1
        with shared_backoff(cpu_fallback=False):
            assert start_of(large) == 2
    assert start_of(large) == 8


@pytest.mark.usefixtures("accelerator")
def test_a_model_that_only_the_cpu_could_hold_begins_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "clear_cache", lambda _: None)
    monkeypatch.setattr(backoff, "_free", lambda _: None)
    tried: list[Attempt] = []

    def attempt(rung: Attempt) -> None:
        tried.append(rung)
        if rung.device.type == "cuda":
            raise no_memory()

    model = torch.nn.Linear(3, 3)
    with shared_backoff():
        for _ in range(2):
            trained = OOMBackoff("Phase", kind="training", device=torch.device("cuda"), size=2, model=model)
            trained.step = 1
            trained.run(attempt)
    assert [str(rung.device) for rung in tried] == ["cuda", "cuda", "cuda", "cpu", "cpu"]
    assert tried[-1] == Attempt(CPU, 2)


def test_what_a_small_model_took_does_not_bring_a_large_one_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large one went to the CPU, then the small one found its size on the device."""
    monkeypatch.setattr(backoff, "clear_cache", lambda _: None)
    monkeypatch.setattr(backoff, "_free", lambda _: None)
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(9, 9)
    cuda = torch.device("cuda")

    def fails_above(size: int) -> Callable[[Attempt], None]:
        def attempt(rung: Attempt) -> None:
            if rung.device == cuda and rung.size > size:
                raise no_memory()

        return attempt

    with shared_backoff():
        for model, size in ((large, 0), (small, 4)):
            OOMBackoff("Phase", kind="encoding", device=cuda, size=16, model=model).run(fails_above(size))
        begins = [
            OOMBackoff("Phase", kind="encoding", device=cuda, size=16, model=model).attempt for model in (small, large)
        ]
        assert begins == [Attempt(cuda, 4), Attempt(CPU, 16)]
        with shared_backoff(cpu_fallback=False):
            assert OOMBackoff("Phase", kind="encoding", device=cuda, size=16, model=large).attempt == Attempt(cuda, 1)
            with shared_backoff(cpu_fallback=True):
                assert OOMBackoff("Phase", kind="encoding", device=cuda, size=16, model=large).attempt == Attempt(
                    cuda, 1
                )


def test_a_step_down_is_told_in_one_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([100 << 20, 300 << 20] * 2)
    monkeypatch.setattr(backoff, "_free", lambda _: next(free))
    _, events = way_down(fails=2)
    assert [record.getMessage() for record in caplog.records] == [
        "Phase, step 1: out of memory on cpu (100 MiB free, 300 after clearing up); trying again.",
        "Phase, step 1: out of memory on cpu (100 MiB free, 300 after clearing up); "
        "going on with 2 texts at once instead of 4.",
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


# Whole phases


class Faults:
    """Raises an out-of-memory error at certain calls of what it wraps, counted from 1."""

    def __init__(self, *at: int) -> None:
        self.at = set(at)
        self.calls = 0
        self.tensors: list[weakref.ref[Tensor]] = []

    def wrap(self, function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            assert all(tensor() is None for tensor in self.tensors)
            fails = self.calls in self.at
            done = function(*args, **kwargs) if after or not fails else None
            if fails:
                activations = torch.zeros(5, requires_grad=True) * 2  # belongs to the failed try alone
                self.tensors.append(weakref.ref(activations))
                raise no_memory()
            return done

        return wrapped


def student_of(body: Path | SentenceTransformer, **settings: Any) -> Any:
    every = {**QUICK, "learning_rate": 1e-3, "epochs": 2, "batch_size": 8, **settings}
    return train_student(pool_signals(), body, labeled=few_labels(), **every)


def teacher_of(body: Path | SentenceTransformer, **settings: Any) -> Any:
    every: dict[str, Any] = {"device": "cpu", "precision": "fp32", "teacher_steps": 8, "teacher_batch_size": 8}
    return train_teacher(few_labels(), body, **every, teacher_learning_rate=1e-3, **settings)


BY_LABELS: dict[str, Any] = {"dropout": False, "objective": "soft-labels", "temperature": 1, "learning_rate": 1e-4}


def transformer_student_of(body: Path, **settings: Any) -> Any:
    return student_of(Path(f"transformer:{body}"), **{**BY_LABELS, **settings})


def transformer_teacher_of(body: Path, **settings: Any) -> Any:
    return teacher_of(Path(f"transformer:{body}"), **{"teacher_dropout": False, **settings})


HEADED: dict[str, Callable[..., Any]] = {"student": student_of, "teacher": teacher_of}
"""Those whose heads are fitted after their bodies."""
TRAININGS = {**HEADED, "transformer student": transformer_student_of, "transformer teacher": transformer_teacher_of}
STEPS = 8
FIRST, MIDDLE, LAST, TWICE, ALL_THE_WAY = (1,), (4,), (8,), (3, 4), (2, 3, 4, 5)
"""The calls that fail. A failed call is made again: the second fault in a row hits the retry."""


def close(one: list[Tensor], other: list[Tensor]) -> None:
    for here, there in zip(one, other, strict=True):
        torch.testing.assert_close(here, there, atol=1e-5, rtol=0)


def inner_trainers(monkeypatch: pytest.MonkeyPatch, name: str, replace: Callable[[Any], Any]) -> None:
    from transformers import Trainer

    monkeypatch.setattr(Trainer, name, replace(getattr(Trainer, name)))


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize(
    ("at", "sizes"),
    [(FIRST, [8]), (MIDDLE, [8]), (LAST, [8]), (TWICE, [8, 4]), (ALL_THE_WAY, [8, 4, 2, 1])],
    ids=["first", "middle", "last", "twice", "all the way"],
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after the backward pass"])
def test_a_step_that_fails_is_done_again_and_the_weights_are_the_same(
    tiny_student: Path,
    training: str,
    at: tuple[int, ...],
    sizes: list[int],
    after: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = weights(TRAININGS[training](tiny_student))
    faults = Faults(*at)
    inner_trainers(monkeypatch, "training_step", lambda step: faults.wrap(step, after=after))
    with shared_backoff() as events:
        trained = weights(TRAININGS[training](tiny_student))
    assert faults.calls > STEPS
    assert [event.after.size for event in events] == sizes
    assert {event.step for event in events} == {at[0]}
    close(trained, expected)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("at", [FIRST, MIDDLE, LAST, TWICE], ids=["first", "middle", "last", "twice"])
def test_an_optimizer_step_that_fails_starts_the_phase_again(
    tiny_student: Path, training: str, at: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the weights may have moved by then."""
    expected = weights(TRAININGS[training](tiny_student))
    faults = Faults(*at)
    monkeypatch.setattr(torch.optim.AdamW, "step", faults.wrap(torch.optim.AdamW.step, after=True))
    with shared_backoff() as events:
        trained = weights(TRAININGS[training](tiny_student))
    assert len(events) == len(at)
    assert faults.calls > STEPS + at[0] - 1
    close(trained, expected)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("training", TRAININGS)
def test_a_training_too_large_for_its_device_is_done_on_the_cpu(
    tiny_student: Path, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights(TRAININGS[training](tiny_student))
    faults = Faults(3, 4, 5, 6, 7)
    inner_trainers(monkeypatch, "training_step", faults.wrap)
    with shared_backoff() as events:
        trained = TRAININGS[training](tiny_student)
    assert [event.after.size for event in events] == [8, 4, 2, 1, 8]
    assert faults.calls == 7 + STEPS  # two good steps are lost
    close(weights(trained), expected)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("training", TRAININGS)
def test_without_the_cpu_the_error_tells_what_was_tried(
    tiny_student: Path, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner_trainers(monkeypatch, "training_step", Faults(*range(3, 99)).wrap)
    tried = rf"Training {training.split()[-1]}, step 3: .* 8, 4, 2, 1 texts at once on cpu"
    with pytest.raises(OutOfMemoryError, match=tried):
        TRAININGS[training](tiny_student, cpu_fallback=False)


@pytest.mark.parametrize("training", HEADED)
def test_a_head_that_cannot_be_fitted_is_no_reason_to_train_again(
    tiny_student: Path, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding_faults(monkeypatch, Faults(*range(1, 99)))
    steps = Faults()
    inner_trainers(monkeypatch, "training_step", steps.wrap)
    with pytest.raises(OutOfMemoryError, match="Fitting head: memory ran out with 32, 16, 8, 4, 2, 1 texts at once"):
        TRAININGS[training](tiny_student)
    assert steps.calls == STEPS


@pytest.mark.parametrize("training", HEADED)
def test_a_head_that_runs_out_of_memory_does_not_repeat_the_training(
    student_body: SentenceTransformer, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [value.clone() for value in student_body.state_dict().values()]

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 74.5 GiB")

    monkeypatch.setattr(f"setfit_kd.{training}.trainer.fit_head", fail)
    steps = Faults()
    inner_trainers(monkeypatch, "training_step", steps.wrap)
    with shared_backoff() as events, pytest.raises(OutOfMemoryError, match=r"head.*74\.5 GiB") as raised:
        HEADED[training](student_body)
    assert steps.calls == STEPS
    assert events == []
    assert "fewer texts" in (raised.value.hint or "")
    assert same(before, list(student_body.state_dict().values()))


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("error", [ValueError("no such row"), KeyboardInterrupt()])
def test_another_error_ends_a_training_at_once(
    tiny_student: Path, training: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise error

    inner_trainers(monkeypatch, "training_step", lambda _: fail)
    with pytest.raises(type(error)):
        TRAININGS[training](tiny_student)
    assert len(calls) == 1


def test_training_in_half_precision_leaves_nothing_on_the_body_when_it_fails(
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
@pytest.mark.parametrize(("most", "ends_with"), [(5, 4), (1, 1)])
def test_a_batch_that_does_not_fit_is_split_until_it_does(
    tiny_student: Path, training: str, most: int, ends_with: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault comes from inside the forward pass, and from a recomputation in the backward pass too."""
    from setfit_kd.losses import BatchLoss

    expected = weights(TRAININGS[training](tiny_student))
    encode = BatchLoss._encode

    def limited(self: BatchLoss, features: dict[str, Tensor]) -> Tensor:
        if len(features["input_ids"]) > most:
            raise no_memory()
        return encode(self, features)

    monkeypatch.setattr(BatchLoss, "_encode", limited)
    with shared_backoff() as events:
        close(weights(TRAININGS[training](tiny_student)), expected)
    assert events[-1].after.size == ends_with
    assert {event.step for event in events} == {1}


@pytest.mark.parametrize("training", TRAININGS)
def test_a_fault_in_a_recomputation_is_met_like_any_other(
    tiny_student: Path, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setfit_kd.losses import BatchLoss

    expected = weights(TRAININGS[training](tiny_student))
    # A step on 8 texts passes 4 of them twice forward, and each again in the backward pass.
    faults = Faults(3, 8)
    monkeypatch.setattr(BatchLoss, "_encode", faults.wrap(BatchLoss._encode))
    close(weights(TRAININGS[training](tiny_student, micro_batch_size=4)), expected)
    assert faults.calls > 4 * STEPS


@pytest.mark.parametrize("training", TRAININGS)
def test_a_trainer_is_dead_before_the_next_one_is_made(
    tiny_student: Path, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimizer's state is twice the size of the model."""
    dead: list[weakref.ref[Any]] = []
    step, calls = torch.optim.AdamW.step, []

    def fail(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            [state, *_] = optimizer.state.values()
            [parameter, *_] = optimizer.state
            dead.extend(map(weakref.ref, (optimizer, state["exp_avg"], parameter.grad)))
            raise no_memory()
        assert all(reference() is None for reference in dead)
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    gc.disable()
    try:
        TRAININGS[training](tiny_student)
    finally:
        gc.enable()
    assert len(calls) == 3 + STEPS
    assert len(dead) == 3


@pytest.mark.parametrize("training", HEADED)
def test_a_finished_training_leaves_no_optimizer(
    tiny_student: Path, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[weakref.ref[Any]] = []
    step = torch.optim.AdamW.step

    def watch(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        done = step(optimizer, *args, **kwargs)
        [state, *_] = optimizer.state.values()
        left[:] = [weakref.ref(state["exp_avg"])]
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)

    def fit(*args: Any, **kwargs: Any) -> Any:
        assert left[0]() is None
        return embed(*args, **kwargs)

    monkeypatch.setattr(f"setfit_kd.{training}.trainer.embed", fit)  # what the head is fitted on
    TRAININGS[training](tiny_student)
    assert left


@pytest.mark.parametrize("training", HEADED)
def test_a_training_that_fails_leaves_the_weights_as_they_were(
    student_body: SentenceTransformer, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [value.clone() for value in student_body.state_dict().values()]
    inner_trainers(monkeypatch, "training_step", Faults(*range(4, 99)).wrap)
    with pytest.raises(OutOfMemoryError):
        HEADED[training](student_body)
    assert same(before, list(student_body.state_dict().values()))


def encoding_faults(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr(SentenceTransformer, "encode", faults.wrap(SentenceTransformer.encode))


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setfit_kd.models.encode._CHUNK", 7)


def test_encoding_takes_batches_that_fit(student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import SentenceTransformer

    texts = pool_signals().texts
    expected = embed(student_body, texts)
    encode: Any = SentenceTransformer.encode

    def limited(self: SentenceTransformer, *args: Any, batch_size: int, **kwargs: Any) -> Any:
        if batch_size > 3:
            raise no_memory()
        return encode(self, *args, batch_size=batch_size, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode", limited)
    np.testing.assert_allclose(embed(student_body, texts), expected, atol=1e-6)


def test_a_speed_is_measured_without_the_failed_tries(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = teacher_of(tiny_student)
    faults = Faults(2, 3)
    encoding_faults(monkeypatch, faults)
    measured = evaluate(model, few_labels())
    assert faults.calls == 1 + 3 + 1  # the warm-up, the tries, and once more for the time
    assert measured.cost.device == "cpu"


@pytest.mark.usefixtures("short_chunks", "accelerator")
@pytest.mark.parametrize(
    ("at", "sizes"),
    [(FIRST, [4]), (MIDDLE, [4]), ((5,), [4]), ((2, 3), [4, 2]), ((2, 3, 4, 5), [4, 2, 1, 4])],
    ids=["first", "middle", "last", "twice", "to the CPU"],
)
def test_encoding_goes_on_where_it_was(
    student_body: SentenceTransformer, at: tuple[int, ...], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = pool_signals().texts  # 33: five chunks
    expected = embed(student_body, texts, batch_size=4)
    faults = Faults(*at)
    encoding_faults(monkeypatch, faults)
    with shared_backoff() as events:
        found = embed(student_body, texts, batch_size=4, description="Scoring pool")
    assert [event.after.size for event in events] == sizes
    assert {(event.phase, event.step) for event in events} == {("Scoring pool", 7 * (at[0] - 1) or None)}
    assert faults.calls == 5 + len(at)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_look_of_early_stopping_that_fails_is_taken_again(
    tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"patience": 9, "epochs": 2}
    expected = weights(student_of(tiny_student, **settings))
    faults = Faults(1, 2)
    encoding_faults(monkeypatch, faults)
    close(weights(student_of(tiny_student, **settings)), expected)
    assert faults.calls == 2 + 2 + 1  # the faults, the looks, the head


@pytest.mark.parametrize("phase", ["scoring", "evaluation", "prediction", "fitting the head", "export"])
def test_phases_that_encode_end_well(
    tiny_student: Path, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labeled, texts = few_labels(), pool_signals().texts

    def work() -> Any:
        model = teacher_of(tiny_student)
        if phase == "scoring":
            return score(model, texts).probabilities
        if phase == "prediction":
            return predict_proba(model, texts)
        if phase == "evaluation":
            return evaluate(model, labeled).probabilities
        if phase == "export":
            bundle = export_bundle(model, tmp_path / f"bundle-{next(number)}", texts=texts, format="onnx")
            return Classifier(bundle.path).predict_proba(texts)
        return model.model_head.coef_

    number = itertools.count()
    expected = work()
    first = {"scoring": 2, "evaluation": 3, "prediction": 2, "fitting the head": 1, "export": 2}[phase]
    encoding_faults(monkeypatch, Faults(first))
    with shared_backoff() as events:
        np.testing.assert_allclose(work(), expected, atol=1e-5)
    assert len(events) == 1


@pytest.mark.usefixtures("accelerator")
def test_a_model_that_does_not_fit_its_device_is_loaded_on_the_cpu(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(teacher_of(tiny_student), tmp_path / "model")
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
    def run(name: str, **settings: Any) -> Any:
        every = {**FAST, "pool_size": 64, "shots": 4, "cache": False, "precision": "fp32"}
        return distill(
            *("bundled:newswire", "bundled:newswire", "bundled:newswire"),
            teacher=str(tiny_teacher),
            student="layers:1",
            output_dir=tmp_path / name,
            **{**every, **settings},
        )

    return run


def test_a_run_with_faults_everywhere_ends_as_one_without(
    small_run: Callable[..., Any], tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = small_run("calm")
    assert json.loads((tmp_path / "calm" / "run.json").read_text())["out_of_memory"] == []
    steps, encodings = Faults(1, 4, 5, 9), Faults(1, 3, 4, 8)
    inner_trainers(monkeypatch, "training_step", steps.wrap)
    encoding_faults(monkeypatch, encodings)
    stormy = small_run("stormy")
    # Rounding goes through three stages, and Adam makes much of the smallest gradients: the measure is the whole way.
    start = list(cut_layers(load_body(tiny_teacher), (0,)).state_dict().values())
    way = distance(weights(expected.student), start)
    assert distance(weights(stormy.student), weights(expected.student)) < 0.01 * way
    # A text on the edge between two classes may fall on its other side.
    assert stormy.metrics["student"]["accuracy"] == pytest.approx(expected.metrics["student"]["accuracy"], abs=0.011)
    told = json.loads((tmp_path / "stormy" / "run.json").read_text())["out_of_memory"]
    assert len(told) == 8
    assert {"Training teacher", "Training student"} <= {one["phase"] for one in told}


def test_max_length_cuts_every_body(small_run: Callable[..., Any]) -> None:
    result = small_run("short", max_length=9)
    for model in (result.teacher, result.student):
        assert model.model_body.max_seq_length == 9
        long, cut = model.model_body.encode(["one two three four " * 9, "one two three four " * 3])
        np.testing.assert_allclose(long, cut, atol=1e-5)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_gradient_checkpointing_changes_nothing_but_memory(
    tiny_student: Path, training: str, micro_batch_size: int | None
) -> None:
    plain, checkpointed = (
        TRAININGS[training](tiny_student, gradient_checkpointing=on, micro_batch_size=micro_batch_size)
        for on in (False, True)
    )
    close(weights(checkpointed), weights(plain))
    layers = checkpointed.model_body[0].auto_model.base_model.encoder.layer
    assert not any("forward" in vars(layer) for layer in layers)


def test_gradient_checkpointing_keeps_no_layers_activations(student_body: SentenceTransformer) -> None:
    from setfit_kd.models import checkpointed_layers

    def kept() -> int:
        saved: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        features = student_body.preprocess(["some words of a text"] * 4)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            student_body(features)["sentence_embedding"].sum()
        return sum(tensor.numel() for tensor in saved)

    plain = kept()
    with checkpointed_layers(student_body):
        assert kept() < plain / 2


def test_a_body_without_layers_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    from setfit_kd.models import checkpointed_layers

    with checkpointed_layers(SentenceTransformer(modules=[BoW(vocab=["a", "b"])], device="cpu")):
        pass
    assert "no transformer layers" in caplog.text
