"""Several evaluation sets: their names, the leak guard, runs, fine-tuning and the evaluation of one model."""

from __future__ import annotations

import json
import logging
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from checks import assert_refused, invoke
from conftest import FAST, newswire
from predictions import LABELS
from synthetic import WORDS, few_labels

from setfit_kd import distill
from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import DataConfig
from setfit_kd.data.sources import evaluation_sources
from setfit_kd.run.inputs import load_run_data
from setfit_kd.run.stage_cache import StageCache
from setfit_kd.run.stages import Stages
from setfit_kd.runtime.classify import join_pair

NAMES = ["CONTRADICTION", "ENTAILMENT", "NEUTRAL"]
PAIRS = ("--text-column", "premise", "--pair-column", "hypothesis")
MODELS = ["teacher", "student", "baseline"]
Row = dict[str, str]


def rows(n: int, seed: int) -> list[Row]:
    """Pairs of texts with one of three labels."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS[i % 3].split(), 3)) for i in range(n)]
    return [{"premise": f"{t} {seed}{i}", "hypothesis": t, "label": NAMES[i % 3]} for i, t in enumerate(texts)]


def write(path: Path, content: list[Row]) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


MATCHED, MISMATCHED, LABELED, POOL = rows(30, 1), rows(21, 2), rows(24, 3), rows(20, 4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of pairs; labeled texts and pool contain texts of both evaluation sets."""
    folder = tmp_path_factory.mktemp("files")
    leaks = [*MATCHED[:3], *MISMATCHED[:3]]
    content = {"labeled": [*LABELED, *leaks], "unlabeled": [*POOL, *leaks]}
    content |= {"dev/test": MATCHED, "other/test": MISMATCHED}
    return {name: write(folder / f"{name}.jsonl", some) for name, some in content.items()}


@pytest.fixture(scope="module")
def flags(files: dict[str, str], tiny_teacher: Path) -> list[str]:
    settings = {**FAST, "labeled": files["labeled"], "unlabeled": files["unlabeled"], "eval": files["dev/test"]}
    settings |= {"teacher": f"transformer:{tiny_teacher}", "student": "layers:1"}
    named = {name.replace("_", "-"): str(value) for name, value in settings.items() if value is not False}
    flags = [f"--no-{name.replace('_', '-')}" for name, value in settings.items() if value is False]
    flags += [part for name, value in named.items() for part in (f"--{name}", value)]
    return [*flags, "--eval", files["other/test"], *PAIRS]


@pytest.fixture(scope="module")
def run_of_pairs(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a run of pairs with two evaluation sets."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = invoke("run", *flags, "--output-dir", folder)
    assert result.exit_code == 0, result.output
    assert "\nEvaluating student on test-2: " in result.stderr
    return folder, result.stdout


class Tables(HTMLParser):
    """Rows of the tables that follow each heading of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.tag, self.heading = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tag = tag

    def handle_data(self, data: str) -> None:
        if self.tag in ("h2", "h3"):
            self.heading, self.tag = data, ""
        elif self.tag == "td":
            self.rows.setdefault(self.heading, []).append(data)


def test_all_models_are_evaluated_on_both_sets(run_of_pairs: tuple[Path, str]) -> None:
    folder, output = run_of_pairs
    metrics = json.loads((folder / "metrics.json").read_text())
    assert sorted(metrics) == sorted(MODELS)
    tables = Tables((folder / "report.html").read_text()).rows["Evaluation set test-2"]
    for name, on_main_set in metrics.items():
        [(set_name, values)] = on_main_set.pop("more_evaluations").items()
        assert set_name == "test-2"
        assert (np.sum(on_main_set["confusion"]), np.sum(values["confusion"])) == (30, 21)
        assert on_main_set.keys() == values.keys()
        assert (values["agreement"] is None) == (name == "teacher")
        expected = [name, *(f"{values[metric]:.1%}" for metric in ("accuracy", "macro_f1"))]
        row = tables.index(name)
        assert [tables[row], tables[row + 1], tables[row + 3]] == expected
    assert metrics["student"]["against"].keys() == {"teacher", "baseline"}
    first, second = output.split("test-2 ")
    assert first.lstrip().startswith("test ")
    assert [first.count(name) for name in MODELS] == [second[: second.index("Finished")].count(name) for name in MODELS]


def test_texts_of_both_sets_are_removed_from_labels_and_pool(
    flags: list[str], files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {name: files[name] for name in ("labeled", "unlabeled")}
    columns: Any = {"text_column": "premise", "pair_column": "hypothesis"}
    config = RunConfig.of(**sources, **columns, eval=[files["dev/test"], files["other/test"]])
    data = load_run_data(config)
    assert list(data.evaluations) == ["test", "test-2"]
    for kept, texts in ((LABELED, data.labeled.texts), (POOL, data.pool)):
        assert texts == [join_pair(row["premise"], row["hypothesis"]) for row in kept]
    report = data.report
    assert (report.labeled_leaks, report.pool_leaks, report.evaluation) == (6, 6, 51)
    augment = Mock(return_value=[])
    monkeypatch.setattr("setfit_kd.run.stages.augment", augment)
    monkeypatch.setattr(RunConfig, "n_augmented", Mock(return_value=1))
    Stages(config, data, StageCache(None)).augment(None)
    assert [text.partition("\x1f")[0] for text in augment.call_args.kwargs["forbidden"]] == [
        row["premise"] for row in (*MATCHED, *MISMATCHED)
    ]


def test_resumed_run_loads_both_evaluations(
    run_of_pairs: tuple[Path, str], trained_steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = run_of_pairs
    before = json.loads((folder / "metrics.json").read_text())
    with caplog.at_level(logging.INFO, "setfit_kd"):
        assert distill(resume=folder).metrics == before
    assert trained_steps == []
    for name in (*MODELS, *(f"{name}@test-2" for name in MODELS)):
        assert f"Stage evaluation/{name}: loaded" in caplog.text


def test_added_set_is_evaluated_without_training_and_removed_again(
    run_of_pairs: tuple[Path, str], files: dict[str, str], trained_steps: list[int]
) -> None:
    folder = shutil.copytree(run_of_pairs[0], Path("copy"))
    sets = [files["dev/test"], files["other/test"]]
    result = distill(resume=folder, eval=[*sets, write(Path("new.jsonl"), rows(9, 6))])
    assert list(result.more_evaluations) == ["test-2", "new"]
    assert "Evaluation set new" in (folder / "report.html").read_text()
    distill(resume=folder, eval=sets)
    assert trained_steps == []
    assert not list((folder / "evaluation").glob("*@new"))
    assert "Evaluation set new" not in (folder / "report.html").read_text()


def test_unknown_class_names_the_file(flags: list[str], files: dict[str, str]) -> None:
    other = write(Path("other.jsonl"), [*rows(4, 5), {"premise": "a", "hypothesis": "b", "label": "UNRELATED"}])
    assert_refused(invoke("run", *flags, "--eval", other, "--output-dir", "run"), "other.jsonl", "'UNRELATED'")
    assert_refused(invoke("run", *flags, "--eval", files["dev/test"], "--output-dir", "run"), "is listed twice")
    labeled = ("--labeled", other, "--unlabeled", files["unlabeled"], "--eval", files["dev/test"], "--eval", other)
    assert_refused(invoke("run", *labeled, *PAIRS, "--output-dir", "run"), "cannot be both the labeled texts")
    assert not Path("run").exists()


def test_sources_of_sets_have_distinct_names() -> None:
    frame, rows = pd.DataFrame({"text": ["a"], "label": ["b"]}), [("a", "b")]
    assert list(evaluation_sources(["a/test.csv", Path("b/TEST.jsonl"), "glue:mnli[dev_matched]"])) == [
        *("test", "TEST-2", "glue-mnli-dev_matched")
    ]
    sets = {"a": frame, "b c": "test.csv", "d": {"text": ["a"], "label": ["b"]}}
    assert list(evaluation_sources(sets)) == ["a", "b-c", "d"]
    columns = {"text": np.array(["a"]), "label": pd.Series(["b"])}
    for source in ("test.csv", frame, rows, [{"text": "a"}], columns, {"text": ["a"], "label": ["b"]}, {}):
        assert list(evaluation_sources(source)) == [""]
    assert evaluation_sources(None) == {}


def test_split_of_a_dictionary_of_data_sets_is_one_set() -> None:
    from datasets import Dataset, DatasetDict

    splits = DatasetDict({name: Dataset.from_dict({"text": [name], "label": ["a"]}) for name in ("train", "test")})
    labeled = [("one", "a"), ("two", "a"), ("three", "b"), ("four", "b")]
    [data] = load_run_data(DataConfig.of(), labeled=labeled, eval=splits).evaluations.values()
    assert data.texts == ["test"]


def test_ensemble_and_students_are_evaluated_on_data_frames(tiny_teacher: Path, tiny_student: Path) -> None:
    frame = pd.DataFrame(newswire("eval")[:30])
    teachers = [str(tiny_teacher), str(tiny_student)]
    train = newswire("train")
    settings: dict[str, Any] = {**FAST, "teacher": teachers, "student": ["static:8", "layers:1"], "baseline": False}
    result = distill(train[:100], train[100:160], {"first": frame, "same": frame, "half": frame[:15]}, **settings)
    assert list(result.more_evaluations) == ["same", "half"]
    assert len(result.evaluations) == 5
    for name, evaluation in result.evaluations.items():
        same, half = (result.more_evaluations[key][name] for key in ("same", "half"))
        np.testing.assert_array_equal(same.probabilities, evaluation.probabilities)
        np.testing.assert_allclose(half.probabilities, evaluation.probabilities[:15], atol=1e-5)
        assert same.quality == evaluation.quality
    assert result.metrics["students/layers-1"]["more_evaluations"].keys() == {"same", "half"}


def test_settings_of_one_set_are_a_string() -> None:
    assert "eval: a.csv\n" in RunConfig.of(eval="a.csv").to_yaml()
    several = RunConfig.of(eval=["a.csv", "b.csv"])
    assert "eval:\n- a.csv\n- b.csv\n" in several.to_yaml()
    assert RunConfig.merged(several, {"seed": 1}).eval == ("a.csv", "b.csv")


def test_finetuned_model_is_evaluated_on_both_sets(files: dict[str, str], tiny_student: Path) -> None:
    sets = ("--eval", files["dev/test"], "--eval", files["other/test"])
    options = ("--steps", 2, "--device", "cpu", "--precision", "fp32", "--output-dir", "tuned", *PAIRS)
    result = invoke("finetune", tiny_student, "--labeled", files["labeled"], *sets, *options)
    assert result.exit_code == 0, result.output
    assert [result.stdout.count(f"tuned ({name})") for name in ("test", "test-2")] == [1, 1]
    metrics = json.loads(Path("tuned/metrics.json").read_text())
    values = [metrics["evaluation"], metrics["more_evaluations"]["test-2"]]
    assert [np.sum(each["confusion"]) for each in values] == [30, 21]
    assert metrics["leaks"]["labeled"] == 6
    refused = invoke("finetune", tiny_student, "--task", "qa", "--labeled", files["labeled"], *sets, *options[:-4])
    assert_refused(refused, "eval: expected one for this task, got 2")


def test_model_is_evaluated_on_both_sets(bundle: Path) -> None:
    data = few_labels()
    content = [{"text": text, "label": LABELS[label]} for text, label in zip(data.texts, data.labels, strict=True)]
    sets = ["--eval", write(Path("all.jsonl"), content), "--eval", write(Path("half.jsonl"), content[:8])]
    result = invoke("evaluate", bundle, *sets, "--json")
    values = json.loads(result.stdout)
    assert [(name, each["eval"], each["eval_texts"]) for name, each in values.items()] == [
        *(("all", "all.jsonl", 16), ("half", "half.jsonl", 8))
    ]
    tables = invoke("evaluate", bundle, *sets).stdout
    for name, each in values.items():
        assert f"\n{bundle} ({name}) " in f"\n{tables}"
        assert f"{each['eval_texts']} evaluation texts: {each['eval']}." in tables
        assert f"{each['macro_f1']:.1%}" in tables
    other = write(Path("other.jsonl"), [{"text": "a", "label": "unheard of"}])
    assert_refused(invoke("evaluate", bundle, *sets, "--eval", other), "other.jsonl", "'unheard of'")


@pytest.mark.parametrize("task", ["qa", "mlm"])
def test_other_tasks_have_one_set(task: str) -> None:
    sources = ("--eval", "a.json", "--eval", "b.json", "--teacher", "model", "--output-dir", "run")
    data = ("--labeled", "c.json") if task == "qa" else ("--unlabeled", "c.txt")
    assert_refused(invoke("run", "--task", task, *data, *sources), "eval: expected one for this task, got 2.")
