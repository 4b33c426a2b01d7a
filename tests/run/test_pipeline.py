"""Complete runs with tiny models."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAST, newswire
from setfit import SetFitModel

from setfit_kd import RunConfig, TeacherSignals, distill, evaluate, load, train_teacher
from setfit_kd.cli.output import console_output
from setfit_kd.config.presets import read_config
from setfit_kd.data.labeled_set import encode_labels
from setfit_kd.data.sources import read
from setfit_kd.data.splits import split_data
from setfit_kd.errors import OutputError
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.heads import at_temperature
from setfit_kd.run_folder.log import record_log


def small_run(teacher: Path, student: Path | str, **settings: Any) -> Any:
    sources = ["bundled:newswire"] * 3
    return distill(*sources, teacher=str(teacher), student=str(student), **{**FAST, **settings})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    small_run(tiny_teacher, tiny_student, output_dir=folder)
    return folder


def test_files_and_metrics_are_complete(run_folder: Path) -> None:
    files = {"config.yaml", "metrics.json", "run.json", "run.log", "report.html", ".lock"}
    expected = files | {"teacher", "signals", "student", "baseline", "evaluation"}
    assert {path.name for path in run_folder.iterdir()} == expected
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert list(metrics) == ["teacher", "baseline", "student"]
    for name, values in metrics.items():
        with_interval = {"accuracy", "macro_f1", "ece", "brier", *([] if name == "teacher" else ["agreement"])}
        cost = {"parameters", "megabytes", "texts_per_second", "device", "method"}
        against = {"against"} if name == "student" else set()
        intervals = {f"{metric}_interval" for metric in with_interval}
        other = {"agreement", "classes", "confusion", "reliability", *cost, *against}
        assert set(values) == {*with_interval, *intervals, *other}
        for metric in with_interval - {"ece"}:  # see bootstrap_calibration
            low, high = values[f"{metric}_interval"]
            assert low <= values[metric] <= high
        assert sum(map(sum, values["confusion"])) == 200
        assert set(values["classes"]) == {"World", "Sports", "Business", "Sci/Tech"}
        assert values["texts_per_second"] > 0
        assert (values["agreement"] is None) == (name == "teacher")
    for metric in ("parameters", "megabytes"):
        assert metrics["student"][metric] < metrics["teacher"][metric]


def test_versions_seed_and_data_are_recorded(run_folder: Path) -> None:
    manifest = json.loads((run_folder / "run.json").read_text())
    assert manifest["seed"] == 0
    assert {"python", "torch", "setfit", "setfit-kd"} <= set(manifest["versions"])
    assert [manifest["data"][name] for name in ("labeled", "pool", "evaluation")] == [32, 568, 200]
    assert set(manifest["seconds"]) == {"teacher", "signals", "student", "baseline", "evaluation"}
    log = (run_folder / "run.log").read_text()
    assert log.index("Data: 32 labeled, 568 pool") < log.index("Stage teacher took") < log.index("Stage student took")
    config = RunConfig.resolve(read_config(run_folder / "config.yaml"))
    assert (config.labeled, config.unlabeled, *(config.eval or ())) == ("bundled:newswire",) * 3
    assert config.to_yaml() == (run_folder / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_models_load_with_setfit_only(run_folder: Path, name: str) -> None:
    texts = [row["text"] for row in newswire("eval")[:20]]
    by_setfit = SetFitModel.from_pretrained(str(run_folder / name), device="cpu")
    model = load(run_folder / name, device="cpu")
    np.testing.assert_allclose(by_setfit.predict_proba(texts, as_numpy=True), predict_proba(model, texts), atol=1e-5)
    assert by_setfit.predict(texts) == [model.labels[i] for i in predict_proba(model, texts).argmax(1)]


def test_signals_are_the_predictions_of_the_teacher(run_folder: Path) -> None:
    signals = TeacherSignals.load(run_folder / "signals")
    teacher = load(run_folder / "teacher", device="cpu")
    assert len(signals) == 568 + 32  # the labeled texts follow the pool
    probabilities, predicted = (
        at_temperature(signals.probabilities, signals.temperature),
        predict_proba(teacher, signals.texts),
    )
    np.testing.assert_allclose(probabilities[568:], predicted[568:], atol=1e-5)
    assert 0 < np.abs(probabilities[:568] - predicted[:568]).mean() < 0.05  # by heads that are fitted on other texts


def test_baseline_is_trained_on_the_labels_only(run_folder: Path, tiny_student: Path) -> None:
    rows = encode_labels(read("bundled:newswire", label_column="label"))
    held_out = encode_labels(read("bundled:newswire", label_column="label", role="test"), rows.label_names)
    data = split_data(rows, rows.texts, {"": held_out}, RunConfig.of(**FAST))
    expected = evaluate(train_teacher(data.labeled, tiny_student, config=RunConfig.of(**FAST)), held_out)
    recorded = json.loads((run_folder / "metrics.json").read_text())["baseline"]
    assert recorded["confusion"] == expected.quality.confusion


def test_student_layers_are_cut_from_the_teacher_before_training(tiny_teacher: Path) -> None:
    settings = {**FAST, "learning_rate": 1e-9, "teacher_learning_rate": 1e-2}
    result = small_run(tiny_teacher, "layers:0,2", baseline=False, **settings)
    original, cut, tuned = (
        dict(body.named_parameters())
        for body in (load_body(tiny_teacher), result.student.model_body, result.teacher.model_body)
    )
    [query] = [name for name in original if name.endswith("layer.2.attention.self.query.weight")]
    torch.testing.assert_close(cut[query.replace("layer.2", "layer.1")], original[query], atol=1e-6, rtol=0)
    assert (tuned[query] - original[query]).abs().max() > 1e-3


@pytest.fixture
def restore_log_levels() -> Iterator[None]:
    levels = {logger: logger.level for logger in (logging.root, logging.getLogger("setfit_kd"))}
    yield
    for logger, level in levels.items():
        logger.setLevel(level)


def configure(level: int) -> AbstractContextManager[None]:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("setfit_kd").setLevel(level)
    return nullcontext()


@pytest.mark.usefixtures("restore_log_levels")
@pytest.mark.parametrize(
    ("configure_logging", "expected"),
    [
        (nullcontext, "warning"),
        (partial(configure, logging.DEBUG), "debug info warning"),
        (partial(configure, logging.ERROR), ""),
        (partial(console_output, quiet=False, verbose=True), "debug info Warning: warning"),
    ],
    ids=["unconfigured", "DEBUG", "ERROR", "--verbose"],
)
def test_recording_the_log_does_not_affect_other_handlers(
    configure_logging: Callable[[], AbstractContextManager[Any]],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def log() -> str:
        for level in ("debug", "info", "warning"):
            getattr(logging.getLogger("setfit_kd.training.loop"), level)(level)
        return " ".join(capsys.readouterr().err.split())

    monkeypatch.setattr(logging.root, "handlers", [])  # as in a new process
    with configure_logging():
        before = log()
        with record_log() as log_file:
            log_file.open(tmp_path / "run.log")
            during = log()
            with record_log():  # as for each further seed
                nested = log()
        assert [before, during, nested, log()] == [expected] * 4
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["debug", "info", "warning"] * 2


def test_nothing_is_written_without_an_output_dir(tiny_teacher: Path, tmp_path: Path) -> None:
    result = small_run(tiny_teacher, "layers:0,2", baseline=False)
    title, _, *rows = repr(result).splitlines()
    assert (title, [row.split()[0] for row in rows]) == ("RunResult of layers:0,2", ["teacher", "student"])
    assert result.output_dir is None
    assert list(tmp_path.iterdir()) == []


def test_data_can_be_passed_as_objects(tiny_teacher: Path, tiny_student: Path) -> None:
    rows = newswire("train")
    pairs = [(row["text"], row["label"]) for row in rows[:80]]
    models = {"teacher": str(tiny_teacher), "student": str(tiny_student)}
    result = distill(pairs, [row["text"] for row in rows], **{**FAST, **models, "shots": None})
    assert result.evaluations == {}
    assert "without an evaluation set" in repr(result)
    assert len(result.signals) == 520 + 80
    assert set(result.student.predict(["A new telescope", "The match ended"])) <= {row["label"] for row in rows}


def test_non_empty_folder_requires_overwrite(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "student").mkdir(parents=True)
    for name in ("student/stale.bin", "notes.txt", "config.yaml"):
        (folder / name).write_text("mine")
    with pytest.raises(OutputError, match="but no run"):  # any project may have a config.yaml
        small_run(tiny_teacher, tiny_student, output_dir=folder, overwrite=True)
    (folder / "run.json").write_text('{"format": 1, "finished": false, "stages": {}}')
    small_run(tiny_teacher, tiny_student, output_dir=folder, overwrite=True, baseline=False)
    assert not (folder / "student" / "stale.bin").exists()
    assert (folder / "notes.txt").read_text() == "mine"


def test_real_model_can_be_distilled_in_a_few_steps(demo_model: str) -> None:
    settings: dict[str, Any] = {"shots": 8, "pool_size": 128, "teacher_steps": 6, "teacher_batch_size": 16, "epochs": 1}
    result = distill(*["bundled:newswire"] * 3, teacher=demo_model, student="layers:0,2,5", device="cpu", **settings)
    accuracy = {name: evaluation.quality.accuracy for name, evaluation in result.evaluations.items()}
    assert accuracy["teacher"] > 0.75
    assert accuracy["student"] > 0.7
    assert (result.evaluations["student"].cost.parameters or 0) < 18e6
