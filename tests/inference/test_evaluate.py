"""Tests of ``setfit-kd evaluate``: models, runs and bundles, and which texts they are evaluated on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checks import assert_refused, invoke
from predictions import LABELS
from synthetic import few_labels

from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.evaluation.measure import write_texts

DATA = LabeledSet(few_labels().texts, few_labels().labels, LABELS, "the synthetic texts")


@pytest.fixture
def run_folder(setfit_folder: Path) -> Path:
    """A run with a student and evaluation texts."""
    shutil.copytree(setfit_folder, "run/student")
    Path("run/config.yaml").write_text("seed: 0\n")
    write_texts(DATA, Path("run/evaluation"))
    return Path("run")


def test_bundle_is_evaluated_like_its_predictions(bundle: Path) -> None:
    from setfit_kd.runtime.classify import Classifier

    rows = [{"text": text, "label": LABELS[label]} for text, label in zip(DATA.texts, DATA.labels, strict=True)]
    Path("eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("evaluate", bundle, "--eval", "eval.jsonl", "--json")
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    correct = Classifier(bundle).predict_proba(DATA.texts).argmax(axis=1) == DATA.labels
    assert values["accuracy"] == pytest.approx(np.mean(correct))
    assert (values["eval"], values["eval_texts"]) == ("eval.jsonl", 16)
    assert (values["parameters"], values["device"]) == (None, "cpu")
    assert values["megabytes"] == round(sum(file.stat().st_size for file in bundle.iterdir()) / 1e6, 1)
    table = invoke("evaluate", bundle, "--eval", "eval.jsonl", "--target-accuracy", "0.1")
    assert "16 evaluation texts: eval.jsonl." in table.stdout
    assert "An accuracy of 10.0% needs --threshold" in table.stdout


@pytest.mark.parametrize("model", [".", "student"])
def test_run_is_evaluated_on_its_own_texts_by_default(model: str, run_folder: Path) -> None:
    result = invoke("evaluate", run_folder / model, "--device", "cpu", "--target-accuracy", "1")
    assert result.exit_code == 0, result.stderr
    assert "16 evaluation texts: the synthetic texts, stored in run/evaluation." in result.stdout
    assert "100.0%" in result.stdout


def test_missing_texts_and_models_are_reported(bundle: Path, run_folder: Path) -> None:
    assert_refused(invoke("evaluate", bundle), f"Found no evaluation texts in {bundle}", "--eval")
    assert_refused(invoke("evaluate", "user/name"), "Found no evaluation texts in user/name", "--eval")
    assert_refused(invoke("evaluate", "nowhere"), "No such file or folder: nowhere")
    assert_refused(invoke("evaluate", "nowhere", "--eval", "no.csv"), "No such file: no.csv")
    (run_folder / "evaluation" / "texts.jsonl").write_text("{}\n")
    assert_refused(invoke("evaluate", run_folder, "--device", "cpu"), "Cannot read run/evaluation/texts.jsonl")
