"""Out-of-memory errors, OOM backoff, and equal results with and without errors."""

from __future__ import annotations

import errno
import gc
import json
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import FAST
from synthetic import QUICK, equal_weights, few_labels, pool_signals, weight_distance, weights
from torch import Tensor
from transformers import Trainer

from setfit_kd import distill, evaluate, load, train_student, train_teacher
from setfit_kd.errors import ConfigError, ModelError, OutOfMemoryError, is_out_of_memory
from setfit_kd.losses.base import BatchLoss
from setfit_kd.memory import backoff as backoff_module
from setfit_kd.memory import devices
from setfit_kd.memory.backoff import Attempt, OOMBackoff, shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models import encode as encode_module
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import embed
from setfit_kd.models.io import save_model
from setfit_kd.models.layers import checkpointed_layers, cut_layers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def oom_error() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore details.")


# Recognizing out-of-memory errors


class OnnxError(Exception):
    __module__ = "onnxruntime.capi.onnxruntime_pybind11_state"


def chained(
    error: Exception, *, cause: Exception | None = None, context: Exception | None = None, suppress: bool = False
) -> Exception:
    """Return an error as from ``raise error from cause``, or as raised while handling ``context``."""
    error.__context__, error.__cause__ = context, cause
    error.__suppress_context__ = suppress
    return error


OOM_ERRORS = [
    oom_error(),
    MemoryError("Unable to allocate 74.5 GiB for an array with shape (100000, 100000) and data type float64"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in another one."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.64 GB, max allowed: 18.13 GB)."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried 8"),
    RuntimeError("std::bad_alloc"),
    OnnxError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 8"),
    OutOfMemoryError("Training teacher: out of memory."),
    chained(ValueError("batch 3"), context=chained(RuntimeError("step 7"), cause=RuntimeError("MPS out of memory"))),
    chained(ModelError("The model does not load."), cause=oom_error()),
]
OTHER_ERRORS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    KeyError("CUDA out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    ConfigError("Unknown device: 'error: out of memory'."),
    OnnxError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Unexpected input data type."),
    chained(ValueError("no such label"), context=oom_error(), suppress=True),
    chained(circular := RuntimeError("circular"), context=circular),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize(
    ("error", "expected"), [*((error, True) for error in OOM_ERRORS), *((error, False) for error in OTHER_ERRORS)]
)
def test_out_of_memory_errors_are_recognized(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


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
    assert resolve_device("cuda") == CUDA  # full, but requested by name: the backoff handles it
    with pytest.raises(ConfigError, match="Unknown device: 'nonsense'"):
        resolve_device("nonsense")
    monkeypatch.setattr(devices, "_available_accelerators", lambda: ["cuda"])
    for name in ("cuda:1", "mps:0"):
        with pytest.raises(ConfigError, match=f"Device '{name}' is not available"):
            resolve_device(name)


def test_device_is_probed_and_its_memory_measured() -> None:
    assert devices._probe_device(CPU) is None
    assert "meta" in str(devices._probe_device(torch.device("meta")))
    free, total = devices.free_memory(CPU)
    assert 0 < free < total


# OOMBackoff alone


def make_backoff(
    kind: str = "encoding", device: torch.device = CPU, batch_size: int = 4, model: torch.nn.Module | None = None
) -> OOMBackoff:
    return OOMBackoff("Phase", kind=kind, device=device, batch_size=batch_size, model=model or torch.nn.Linear(2, 2))


@pytest.fixture
def no_cuda_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow attempts on CUDA devices that do not exist."""
    monkeypatch.setattr(backoff_module, "clear_cache", lambda _: None)
    monkeypatch.setattr(backoff_module, "_free_mb", lambda _: None)


def run_failing(
    *, failures: int, kind: str = "training", device: str = "cpu", step: int | None = 1, **settings: Any
) -> tuple[list[Attempt], list[dict[str, Any]]]:
    """Run a phase whose first attempts fail; return all attempts and the events."""
    attempts: list[Attempt] = []

    def fail_first(attempt: Attempt) -> None:
        attempts.append(attempt)
        if len(attempts) <= failures:
            raise oom_error()

    with shared_backoff(**settings) as events:
        backoff = make_backoff(kind, torch.device(device))
        backoff.step = step
        backoff.run(fail_first)
    return attempts, events


@pytest.mark.usefixtures("no_cuda_calls")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"failures": 0, "device": "cuda"}, ["4 cuda"]),
        ({"failures": 6, "device": "cuda"}, ["4 cuda", "4 cuda", "2 cuda", "1 cuda", "4 cpu", "2 cpu", "1 cpu"]),
        ({"failures": 2, "device": "cuda", "step": None}, ["4 cuda", "4 cuda", "4 cpu"]),  # before the first step
    ],
)
def test_attempts_are_a_retry_then_halved_sizes_then_the_cpu(settings: dict[str, Any], expected: list[str]) -> None:
    attempts, events = run_failing(**settings)
    assert [f"{attempt.batch_size} {attempt.device}" for attempt in attempts] == expected
    as_dicts = [{"device": str(attempt.device), "texts": attempt.batch_size} for attempt in attempts]
    assert [event["from"] for event in events] == as_dicts[:-1]
    assert [event["to"] for event in events] == as_dicts[1:]


@pytest.mark.usefixtures("no_cuda_calls")
@pytest.mark.parametrize(
    ("settings", "attempts", "hints"),
    [
        ({"device": "cuda"}, "with batch size 4, 2, 1 on cuda and with batch size 4, 2, 1 on cpu", 2),
        ({"device": "cuda", "cpu_fallback": False}, "with batch size 4, 2, 1 on cuda", 3),
        ({"kind": "encoding"}, "with batch size 4, 2, 1 on cpu", 1),
        ({"kind": "loading", "cpu_fallback": False}, "on cpu", 0),
    ],
)
def test_final_error_lists_all_attempts(settings: dict[str, Any], attempts: str, hints: int) -> None:
    with pytest.raises(OutOfMemoryError, match=rf": out of memory {attempts} \(CUDA out of memory") as raised:
        run_failing(failures=99, **settings)
    parts = ("--max-length", "--gradient-checkpointing", "--cpu-fallback")
    assert [part in (raised.value.hint or "") for part in parts] == [True] * hints + [False] * (3 - hints)
    assert raised.value.exit_code == 71


@pytest.mark.parametrize("error", [ValueError("CUDA out of memory"), KeyboardInterrupt()])
def test_other_errors_are_not_retried(error: BaseException) -> None:
    with shared_backoff() as events, pytest.raises(type(error)) as raised:
        make_backoff().run(Mock(side_effect=[error]))
    assert raised.value is error
    assert events == []


def fail_above(max_size: int, device: torch.device) -> Callable[[Attempt], None]:
    """Return a function that runs out of memory with larger batches on a device."""

    def run(attempt: Attempt) -> None:
        if attempt.device == device and attempt.batch_size > max_size:
            raise oom_error()

    return run


def test_later_phases_start_from_known_limits() -> None:
    small, medium, large = (torch.nn.Linear(n, n) for n in (2, 3, 4))

    def initial_size(model: torch.nn.Module, kind: str = "encoding", batch_size: int = 8) -> int:
        return make_backoff(kind, CPU, batch_size, model).attempt.batch_size

    with shared_backoff():
        make_backoff("encoding", CPU, 8, medium).run(fail_above(2, CPU))
        assert [initial_size(model) for model in (small, medium, large)] == [8, 2, 2]
        assert initial_size(large, kind="training") == 8
        assert initial_size(large, batch_size=1) == 1
        with shared_backoff(cpu_fallback=False):
            assert initial_size(large) == 2
    assert initial_size(large) == 8


@pytest.mark.usefixtures("no_cuda_calls")
def test_model_that_only_fit_on_the_cpu_starts_there() -> None:
    """The large model falls back to the CPU; then the small model fits on the device with a smaller batch."""
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(9, 9)

    def initial_attempt(model: torch.nn.Module) -> Attempt:
        return make_backoff("encoding", CUDA, 16, model).attempt

    with shared_backoff():
        for model, max_size in ((large, 0), (small, 4)):
            make_backoff("encoding", CUDA, 16, model).run(fail_above(max_size, CUDA))
        assert initial_attempt(small) == Attempt(CUDA, 4)
        assert initial_attempt(large) == Attempt(CPU, 16)
        with shared_backoff(cpu_fallback=False):
            assert initial_attempt(large) == Attempt(CUDA, 1)
            with shared_backoff(cpu_fallback=True):
                assert initial_attempt(large) == Attempt(CUDA, 1)


def test_each_event_is_logged_with_the_free_memory_if_it_is_known(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_failure = RuntimeError("CUDA error: unspecified launch failure")
    memory = Mock(side_effect=[launch_failure, launch_failure, (100 << 20, 0), (300 << 20, 0)])
    monkeypatch.setattr(backoff_module, "free_memory", memory)
    _, events = run_failing(failures=2)
    assert caplog.messages == [
        "Phase, step 1: out of memory on cpu; retrying.",
        "Phase, step 1: out of memory on cpu (100 MiB free, 300 MiB after clearing the cache); "
        "continuing with batch size 2 instead of 4.",
    ]
    assert [event["free_mb_before"] for event in events] == [None, 100]
    assert [event["free_mb_after"] for event in events] == [None, 300]
    names = ("phase", "kind", "step", "cause")
    expected = ["Phase", "training", 1, "CUDA out of memory. Tried to allocate 2.00 GiB."]
    assert [events[1][name] for name in names] == expected


# Training


Inject = Callable[..., list[int]]


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Function that makes certain calls of a method, from 1, run out of memory; return a list with one item per call.

    ``after`` raises the error after the method has run.
    """

    def patch(owner: Any, name: str, *failing_calls: int, after: bool = False) -> list[int]:
        function, calls, tensors = getattr(owner, name), list[int](), list[weakref.ref[Tensor]]()

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            assert all(tensor() is None for tensor in tensors)
            fails = len(calls) in failing_calls
            result = function(*args, **kwargs) if after or not fails else None
            if fails:
                activations = torch.zeros(5, requires_grad=True) * 2  # only the failed attempt refers to it
                tensors.append(weakref.ref(activations))
                raise oom_error()
            return result

        monkeypatch.setattr(owner, name, call)
        return calls

    return patch


STEPS = 8


def run_training(training: str, body: Any, **settings: Any) -> Any:
    """Train a student or a teacher in `STEPS` steps, a transformer without dropout."""
    defaults: dict[str, Any] = {"teacher_steps": STEPS, "teacher_batch_size": 8, "teacher_learning_rate": 1e-3}
    student_defaults = {**QUICK, "learning_rate": 1e-3, "epochs": 2, "batch_size": 8}
    if training.startswith("transformer"):
        body = f"transformer:{body}"
        defaults["teacher_dropout"] = False
        student_defaults |= {"dropout": False, "objective": "soft-labels", "temperature": 1, "learning_rate": 1e-4}
    if training.endswith("teacher"):
        return train_teacher(few_labels(), body, **{**defaults, "device": "cpu", "precision": "fp32", **settings})
    return train_student(pool_signals(), body, labeled=few_labels(), **{**student_defaults, **settings})


with_fitted_head = pytest.mark.parametrize("training", ["student", "teacher"])


@pytest.fixture(params=["student", "teacher", "transformer student", "transformer teacher"])
def training(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def train(training: str, tiny_student: Path) -> Callable[..., Any]:
    """Function that runs a training of `STEPS` steps."""
    return partial(run_training, training, tiny_student)


@cache
def train_without_errors(training: str, body: Path) -> list[Tensor]:
    return weights(run_training(training, body))


@pytest.fixture
def expected(training: str, tiny_student: Path) -> list[Tensor]:
    """The weights after a training without errors."""
    return train_without_errors(training, tiny_student)


def assert_weights_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for actual_tensor, expected_tensor in zip(actual, expected, strict=True):
        torch.testing.assert_close(actual_tensor, expected_tensor, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    ("failing_calls", "sizes", "after", "n_repeated"),
    [((1,), [8], True, 0), ((3, 4, 5, 6, 7), [8, 4, 2, 1, 8], False, 2)],  # the fallback to the CPU repeats two steps
    ids=["first", "to the CPU"],
)
def test_failed_step_is_retried_with_equal_weights(
    train: Any, expected: list[Tensor], failing_calls: Any, sizes: Any, after: bool, n_repeated: int, inject: Inject
) -> None:
    """A failed call is repeated, so the second fault in a row hits the retry; ``after`` is after the backward pass."""
    faults = inject(Trainer, "training_step", *failing_calls, after=after)
    with shared_backoff() as events:
        assert_weights_close(weights(train()), expected)
    assert len(faults) == STEPS + len(failing_calls) + n_repeated
    assert [event["to"]["texts"] for event in events] == sizes
    assert {event["step"] for event in events} == {failing_calls[0]}


def test_failed_optimizer_step_restarts_the_phase(train: Any, expected: list[Tensor], inject: Inject) -> None:
    """Some of the weights may have been updated by then."""
    faults = inject(torch.optim.AdamW, "step", 3, 4, after=True)
    with shared_backoff() as events:
        assert_weights_close(weights(train()), expected)
    assert len(events) == 2
    assert len(faults) > STEPS + 2


@with_fitted_head
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fit_head", MemoryError("Unable to allocate 74.5 GiB"), r"out of memory while fitting the head .*74\.5 GiB"),
        ("embed", OutOfMemoryError("Fitting head: out of memory."), r"^Fitting head: out of memory\.$"),
    ],
)
def test_failed_head_fit_does_not_repeat_training(
    training: str, train: Any, name: str, error: Exception, message: str, inject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"setfit_kd.{training}.trainer.{name}", Mock(side_effect=error))
    steps = inject(Trainer, "training_step")
    with shared_backoff() as events, pytest.raises(OutOfMemoryError, match=message):
        train()
    assert (len(steps), events) == (STEPS, [])


@pytest.mark.usefixtures("accelerator")
@with_fitted_head
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_failed_training_restores_the_body(
    student_body: SentenceTransformer, tiny_student: Path, training: str, precision: str, inject: Inject
) -> None:
    inject(torch.optim.AdamW, "step", *range(2, 99))
    message = rf"Training {training}, step \d: .* batch size 8, 4, 2, 1 on cpu"
    with shared_backoff() as events, pytest.raises(OutOfMemoryError, match=message):
        run_training(training, student_body, precision=precision, cpu_fallback=False)
    assert all(event["to"]["texts"] <= event["from"]["texts"] for event in events)  # no fallback
    original = load_body(tiny_student)
    assert equal_weights(list(student_body.state_dict().values()), list(original.state_dict().values()))
    np.testing.assert_array_equal(embed(student_body, ["match goal"]), embed(original, ["match goal"]))  # not in bf16
    assert not student_body.training
    assert all(parameter.grad is None for parameter in student_body.parameters())


def test_batch_is_split_until_it_fits(train: Any, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is raised in the forward pass and in the recomputation during the backward pass."""
    encode = BatchLoss._encode

    def limited(self: BatchLoss, features: dict[str, Tensor]) -> Tensor:
        if len(features["input_ids"]) > 2:
            raise oom_error()
        return encode(self, features)

    monkeypatch.setattr(BatchLoss, "_encode", limited)
    with shared_backoff() as events:
        assert_weights_close(weights(train()), expected)
    assert events[-1]["to"]["texts"] == 2
    assert {event["step"] for event in events} == {1}


def test_optimizer_is_freed_before_the_next_attempt_and_before_the_head_is_fitted(
    training: str, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer's state is twice the size of the model."""
    step, calls, references = torch.optim.AdamW.step, list[int](), list[weakref.ref[Any]]()

    def fail_once(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the first step of the second attempt
            assert all(reference() is None for reference in references)
        result = step(optimizer, *args, **kwargs)
        [state, *_] = optimizer.state.values()
        references[:] = [weakref.ref(optimizer), weakref.ref(state["exp_avg"])]
        if len(calls) == 3:
            raise oom_error()
        return result

    def checked_embed(*args: Any, **kwargs: Any) -> Any:
        assert references[1]() is None
        return embed(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", fail_once)
    if not training.startswith("transformer"):
        monkeypatch.setattr(f"setfit_kd.{training}.trainer.embed", checked_embed)  # called to fit the head
    gc.disable()
    try:
        train()
    finally:
        gc.enable()
    assert len(calls) == 3 + STEPS


# Encoding and loading


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(("failing_calls", "sizes"), [((1,), [4]), ((2, 3, 4, 5), [4, 2, 1, 4])])
def test_encoding_continues_after_the_last_batch(
    student_body: Any, failing_calls: Any, sizes: Any, inject: Inject, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = pool_signals().texts
    expected = embed(student_body, texts, batch_size=4)
    monkeypatch.setattr("setfit_kd.models.encode._CHUNK", 7)  # five chunks of 33 texts
    faults = inject(encode_module, "encode_tokens", *failing_calls)
    with shared_backoff() as events:
        embeddings = embed(student_body, texts, batch_size=4, description="Scoring pool")
    assert [event["to"]["texts"] for event in events] == sizes
    positions = {(event["phase"], event["step"]) for event in events}
    assert positions == {("Scoring pool", 7 * (failing_calls[0] - 1) or None)}
    assert len(faults) == 5 + len(failing_calls)
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)


def test_speed_excludes_failed_attempts(tiny_student: Path, inject: Inject) -> None:
    model = run_training("teacher", tiny_student)
    faults = inject(encode_module, "encode_tokens", 2, 3)
    assert evaluate(model, few_labels()).cost.device == "cpu"
    assert len(faults) == 1 + 3 + 1  # the warm-up, the attempts, and a timed repetition


@pytest.mark.usefixtures("accelerator")
def test_model_that_does_not_fit_is_loaded_on_the_cpu(
    tiny_student: Path, tmp_path: Path, inject: Inject, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(run_training("teacher", tiny_student), tmp_path / "model")
    body = load_body(tmp_path / "model")
    inject(body, "to", 1, 2)
    monkeypatch.setattr("setfit_kd.models.io.load_body", lambda _: body)
    with shared_backoff() as events:
        model = load(tmp_path / "model", device="cpu")
    assert [event["phase"] for event in events] == ["Loading model"] * 2
    assert model.predict_proba(["match goal"]).shape == (1, 4)


# Whole runs and less memory


def test_run_with_faults_equals_run_without(tiny_teacher: Path, tmp_path: Path, inject: Inject) -> None:
    def run(name: str) -> tuple[Any, list[dict[str, Any]]]:
        settings = {**FAST, "pool_size": 64, "shots": 4, "cache": False, "max_length": 9, "output_dir": tmp_path / name}
        result = distill(*["bundled:newswire"] * 2, teacher=str(tiny_teacher), student="layers:1", **settings)
        return result, json.loads((tmp_path / name / "run.json").read_text())["out_of_memory"]

    expected, events = run("without")
    assert events == []
    for model in (expected.teacher, expected.student):
        assert model.model_body.max_seq_length == 9
    inject(Trainer, "training_step", 1, 4, 5, 9)
    inject(encode_module, "encode_tokens", 1, 3, 4)
    result, events = run("with")
    # Rounding errors accumulate over three stages and Adam amplifies small gradients, so compare with the total update.
    start = list(cut_layers(load_body(tiny_teacher), (0,)).state_dict().values())
    update = weight_distance(weights(expected.student), start)
    assert weight_distance(weights(result.student), weights(expected.student)) < 0.01 * update
    assert len(events) == 4 + 3
    assert {event["phase"] for event in events} >= {"Training teacher", "Scoring pool", "Training student"}


def test_gradient_checkpointing_does_not_change_weights(train: Any, expected: list[Tensor]) -> None:
    assert_weights_close(weights(train(gradient_checkpointing=True, micro_batch_size=3)), expected)


def test_gradient_checkpointing_does_not_store_activations_of_layers(student_body: SentenceTransformer) -> None:
    def n_saved_values() -> int:
        saved: list[int] = []
        features = student_body.preprocess(["some words of a text"] * 4)
        pack = lambda tensor: saved.append(tensor.numel())  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: torch.empty(0)):
            student_body(features)["sentence_embedding"].sum()
        return sum(saved)

    plain = n_saved_values()
    with checkpointed_layers(student_body):
        assert n_saved_values() < plain / 2


def test_checkpointing_a_body_without_layers_logs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    with checkpointed_layers(SentenceTransformer(modules=[BoW(vocab=["a", "b"])], device="cpu")):
        pass
    assert "no transformer layers" in caplog.text
