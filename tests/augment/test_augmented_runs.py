"""Pools widened by texts that are made: what a run makes of them, keeps of them, and makes anew."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import FAST, Run, make_body, newswire

from setfit_kd import RunConfig, RunResult, TeacherSignals, distill, load
from setfit_kd.augment import augment, load_fill_mask
from setfit_kd.augment.stage import drop_uncertain
from setfit_kd.cli import main
from setfit_kd.data import LabeledSet, normalise
from setfit_kd.errors import ConfigError, ModelError
from setfit_kd.models import predict_proba
from setfit_kd.models.temperature import at_temperature
from setfit_kd.run.augment_stage import augmented_texts
from setfit_kd.run.data import RunData, load_run_data
from setfit_kd.run.stage_cache import StageCache

WANTED = 40
TRAIN = newswire("train")
LABELED, POOL = TRAIN[:24], [row["text"] for row in TRAIN[24:54]]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def would_be_made() -> list[str]:
    """What comes out where nothing is forbidden."""
    return augment([*POOL, *(row["text"] for row in LABELED)], WANTED, seed=0)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Any]:
    """Settings of a run whose evaluation set holds texts that would be made."""
    folder = tmp_path_factory.mktemp("given")
    leaked = [{"text": f" {text.upper()}", "label": "World"} for text in would_be_made()[::4]]
    return {
        **FAST,
        "labeled": write(folder / "labeled.jsonl", LABELED),
        "unlabeled": write(folder / "pool.jsonl", [{"text": text} for text in POOL]),
        "eval": write(folder / "eval.jsonl", [*newswire("eval")[:10], *leaked]),
        "teacher": str(tiny_teacher),
        "student": "static:4",
        "shots": None,
        "batch_size": 16,
        "baseline": False,
        "cache": False,
        "augment": WANTED,
        "augment_confidence": 0.0,
    }


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random masked language model of 64 positions."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("models") / "masked-lm"
    plain = make_body(folder.with_name("body"), layers=1, width=16).with_name("body-plain")
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig.from_pretrained(plain)).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Widened:
    """A run whose pool was widened, every text kept."""

    folder: Path
    result: RunResult

    @property
    def made(self) -> list[str]:
        return made_in(self.folder)

    @property
    def confidence(self) -> Any:
        """Of the teacher in the texts that were made."""
        said = TeacherSignals.load(self.folder / "signals")
        assert said.temperature != 1
        return at_temperature(said.probabilities[rows_made()], said.temperature).max(axis=1)


def made_in(folder: Path) -> list[str]:
    lines = (folder / "augmented" / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def rows_made() -> slice:
    return slice(len(POOL), len(POOL) + WANTED)


@pytest.fixture(scope="module")
def widened(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Widened:
    folder = tmp_path_factory.mktemp("runs") / "widened"
    return Widened(folder, run(output_dir=folder))


@pytest.fixture
def copied(widened: Widened, tmp_path: Path) -> Path:
    return Path(shutil.copytree(widened.folder, tmp_path / "run"))


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("This was made before.")


@contextmanager
def nothing_made_anew(*names: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(f"setfit_kd.{name}", refuse)
        yield


TEXTS, TEACHER, SCORES = (
    "augment.stage.augment",
    "run.teacher_stages.train_teacher",
    "run.teacher_stages.refine_and_score",
)
STUDENT = "run.student_stages.train_student"


# What is made, and what the teacher says of it


def test_the_teacher_labels_the_pool_what_was_made_of_it_and_the_labeled_texts(widened: Widened) -> None:
    assert len(widened.made) == WANTED
    expected = [*POOL, *widened.made, *(row["text"] for row in LABELED)]
    assert TeacherSignals.load(widened.folder / "signals").texts == expected
    assert widened.result.signals.texts == expected


def test_what_the_teacher_says_is_of_the_texts_as_they_were_made(widened: Widened) -> None:
    signals = TeacherSignals.load(widened.folder / "signals")
    said = predict_proba(load(widened.folder / "teacher", device="cpu"), signals.texts)
    sharp = np.log(np.maximum(signals.probabilities, 1e-30)) / signals.temperature
    meant = np.exp(sharp) / np.exp(sharp).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(said, meant, atol=1e-4)


def test_no_text_that_was_made_is_there_already(widened: Widened, base: dict[str, Any]) -> None:
    made = [normalise(text) for text in widened.made]
    held_out = [json.loads(line)["text"] for line in Path(base["eval"]).read_text(encoding="utf-8").splitlines()]
    there = {normalise(text) for text in (*POOL, *held_out, *(row["text"] for row in LABELED))}
    assert there & {normalise(text) for text in would_be_made()}, "nothing is to be seen"
    assert len(set(made)) == WANTED
    assert not there & set(made)


def test_without_an_evaluation_set_nothing_is_forbidden(base: dict[str, Any]) -> None:
    config = RunConfig.of(**{**base, "eval": None})
    assert augmented_texts(config, load_run_data(config), None, StageCache(None)) == would_be_made()


def test_nothing_is_made_unless_it_is_asked_for(run: Run, copied: Path) -> None:
    result = run(augment=None, resume=copied)
    assert result.signals.texts == [*POOL, *(row["text"] for row in LABELED)]
    assert not (copied / "augmented").exists()


def test_fewer_than_are_wanted_are_warned_of(base: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    config = RunConfig.of(**base)
    labeled = LabeledSet(["rain fell", "play stopped"], np.arange(2), ("a", "b"))
    few = RunData(labeled, ["one word"], None, load_run_data(config).report)
    made = augmented_texts(config, few, None, StageCache(None))
    assert {"fell rain", "rain stopped"} <= set(made)
    assert len(made) < WANTED
    assert f"Of 3 texts, only {len(made)} others could be made." in caplog.messages


def test_a_run_of_no_more_than_pieces_goes_on_without_texts(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    single = [row["text"].replace(" ", "_") for row in TRAIN[:40]]
    labeled = [(text, "ab"[place % 2]) for place, text in enumerate(single[:20])]
    result = run(labeled=labeled, unlabeled=single[20:], eval=None)
    assert result.signals.texts == [*single[20:], *single[:20]]
    assert "Of 40 texts, only 0 others could be made." in caplog.messages


# What is kept


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_what_the_teacher_is_not_sure_of_is_dropped(
    share: float, widened: Widened, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    least = float(np.quantile(widened.confidence, share))
    with caplog.at_level(logging.INFO, "setfit_kd"), nothing_made_anew(TEXTS, TEACHER, SCORES):
        result = distill(resume=copied, augment_confidence=least)
    kept = [text for text, sure in zip(widened.made, widened.confidence, strict=True) if sure >= least]
    assert 0 < len(kept) < WANTED
    assert result.signals.texts == [*POOL, *kept, *(row["text"] for row in LABELED)]
    before = TeacherSignals.load(copied / "signals")
    assert len(before) == len(POOL) + WANTED + len(LABELED)
    place = {text: row for row, text in enumerate(before.texts)}
    rows = [place[text] for text in result.signals.texts]
    np.testing.assert_array_equal(result.signals.probabilities, before.probabilities[rows])
    assert before.embeddings is not None
    np.testing.assert_array_equal(result.signals.embeddings, before.embeddings[rows])
    assert f"Of {WANTED} texts that were made, the teacher is sure enough of {len(kept)}." in caplog.messages
    assert "Stage student: taken from" not in caplog.text


def test_texts_that_were_not_made_are_kept_however_doubtful(copied: Path) -> None:
    result = distill(resume=copied, augment_confidence=1.0)
    said = TeacherSignals.load(copied / "signals").probabilities.max(axis=1)
    assert said[: len(POOL)].min() < 1
    assert result.signals.texts[: len(POOL)] == POOL
    assert result.signals.texts[-len(LABELED) :] == [row["text"] for row in LABELED]


def signals(confidence: list[float], temperature: float = 1.0) -> TeacherSignals:
    said = np.array([[one, 1 - one] for one in confidence], np.float32)
    return TeacherSignals([f"text {row}" for row in range(len(said))], said, ("a", "b"), said, temperature=temperature)


def test_texts_are_doubted_by_what_the_signals_mean() -> None:
    sharp = signals([0.9, 0.6, 0.999], temperature=4.0)  # 0.63, 0.53 and 0.85
    assert drop_uncertain(sharp, range(3), min_confidence=0.6).texts == ["text 0", "text 2"]


@pytest.mark.parametrize(
    ("rows", "least", "kept"),
    [
        (range(1, 4), 0.75, [0, 1, 3, 4]),  # 0.75 is enough, for the second label too
        (range(1, 4), 0.0, [0, 1, 2, 3, 4]),
        (range(1, 4), 1.0, [0, 4]),
        (range(5), 0.75, [1, 3]),
        (range(0), 1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_only_what_was_made_must_be_sure(rows: range, least: float, kept: list[int]) -> None:
    found = drop_uncertain(signals([0.5, 0.75, 0.6, 0.125, 0.55]), rows, min_confidence=least)
    assert found.texts == [f"text {row}" for row in kept]
    assert len(found.probabilities) == len(kept)


# What a resumed run does again


def test_a_finished_run_is_taken_whole_from_its_folder(widened: Widened, copied: Path) -> None:
    with nothing_made_anew(TEXTS, TEACHER, SCORES, STUDENT, "run.student_stages.evaluate"):
        result = distill(resume=copied)
    assert (copied / "metrics.json").read_bytes() == (widened.folder / "metrics.json").read_bytes()
    assert result.signals.texts == widened.result.signals.texts


@pytest.mark.parametrize("damage", ["gone", "broken"])
def test_damaged_texts_are_made_again_and_are_the_same(
    damage: str, widened: Widened, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = copied / "augmented" / "texts.jsonl"
    file.unlink() if damage == "gone" else file.write_text('"cut o')
    with nothing_made_anew(TEACHER, SCORES, STUDENT):
        distill(resume=copied)
    assert "Stage augmented is gone through again" in caplog.text
    assert made_in(copied) == widened.made


def test_a_run_that_is_stopped_goes_on_with_the_texts_that_it_made(
    run: Run, widened: Widened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"setfit_kd.{TEACHER}", stop)
        with pytest.raises(KeyboardInterrupt):
            run(output_dir=tmp_path / "run")
    with nothing_made_anew(TEXTS):
        result = distill(resume=tmp_path / "run")
    assert result.signals.texts == widened.result.signals.texts
    for name, of in widened.result.evaluations.items():
        assert result.evaluations[name].quality == of.quality


def test_each_seed_makes_texts_of_its_own(base: dict[str, Any]) -> None:
    made = []
    for seed in (0, 1):
        config = RunConfig.of(**{**base, "seed": seed})
        made.append(augmented_texts(config, load_run_data(config), None, StageCache(None)))
    assert len(made[0]) == len(made[1]) == WANTED
    assert set(made[0]) != set(made[1])


# A masked language model


def test_some_are_made_by_a_masked_language_model(base: dict[str, Any], masked_lm: Path) -> None:
    config = RunConfig.of(**base, augment_model=str(masked_lm))
    data = load_run_data(config)
    assert data.evaluation is not None
    made = augmented_texts(config, data, masked_lm, StageCache(None))
    fill = load_fill_mask(masked_lm, device=torch.device("cpu"))
    own = [*data.pool, *data.labeled.texts]
    assert made == augment(own, WANTED, seed=0, forbidden=data.evaluation.texts, fill=fill)
    alone = augmented_texts(RunConfig.of(**base), data, None, StageCache(None))
    words = {word for text in own for word in text.split()}
    assert {word for text in alone for word in text.split()} <= words
    assert len({word for text in made for word in text.split()} - words) > 10  # which none of the texts has


def test_a_run_with_a_model_by_command(base: dict[str, Any], masked_lm: Path, widened: Widened, tmp_path: Path) -> None:
    settings = {name: value for name, value in base.items() if value is not None and not isinstance(value, bool)}
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = ["run", *flags, "--no-cache", "--no-baseline", "--output-dir", tmp_path / "run"]
    done = invoke(*command, "--augment-model", masked_lm)
    assert done.exit_code == 0, done.output
    made = made_in(tmp_path / "run")
    assert len(made) == WANTED
    assert made != widened.made
    assert read_json(tmp_path / "run/run.json")["seconds"]["augmented"] >= 0
    assert str(masked_lm) in (tmp_path / "run/report.md").read_text(encoding="utf-8").replace("\\", "")


@pytest.mark.parametrize("by_model", [False, True])
def test_other_texts_train_no_teacher(by_model: bool, copied: Path, widened: Widened, masked_lm: Path) -> None:
    with nothing_made_anew(TEACHER):
        result = distill(resume=copied, **({"augment_model": str(masked_lm)} if by_model else {"augment": 20}))
    made = made_in(copied)
    assert len(made) == (WANTED if by_model else 20)
    assert made != widened.made
    assert result.signals.texts[len(POOL) : -len(LABELED)] == made


def test_with_another_evaluation_set_none_of_its_texts_is_kept(copied: Path, widened: Widened, tmp_path: Path) -> None:
    leaked = [{"text": text.upper(), "label": "World"} for text in widened.made[:3]]
    result = distill(resume=copied, eval=write(tmp_path / "other.jsonl", [*newswire("eval")[:10], *leaked]))
    assert not set(widened.made[:3]) & {*made_in(copied), *result.signals.texts}


def test_a_model_that_has_changed_makes_other_texts(copied: Path, masked_lm: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(masked_lm, tmp_path / "model"))
    distill(resume=copied, augment_model=str(model))
    (model / "note.txt").write_text("trained further")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setfit_kd.augment.stage.augment", refuse)
        with pytest.raises(AssertionError, match="made before"):
            distill(resume=copied)


def test_labels_alone_are_widened_to_a_pool(run: Run) -> None:
    result = run(unlabeled=None, batch_size=32)
    assert len(LABELED) < 32 < len(result.signals)


@pytest.mark.parametrize(("name", "message"), [("BODY", "masked language model"), ("/not/there", "no model folder")])
def test_what_is_no_such_model_is_refused(
    name: str, message: str, run: Run, tiny_student: Path, tmp_path: Path
) -> None:
    model = name.replace("BODY", str(tiny_student.with_name("student-plain")))
    with nothing_made_anew(TEACHER), pytest.raises(ModelError, match=message):
        run(augment_model=model, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Settings and plans


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": 5, "signals": "said.jsonl"}, "augment: with signals from elsewhere, there is no teacher"),
        ({"augment_model": "a-model"}, "augment_model: say by augment how many"),
        ({"augment": 0}, "augment: "),
        ({"augment": 5, "augment_confidence": 1.5}, "augment_confidence: "),
        ({"augment": 5, "augment_model": " "}, "augment_model: must not be empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.of(**settings)
