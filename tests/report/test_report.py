"""Reports of a run: HTML page, model cards, and comparison of runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from checks import assert_refused, invoke, read_tree, truncate_file
from conftest import FAST

from setfit_kd import distill
from setfit_kd.config.run import RunConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.evaluation.measure import Cost, Evaluation, read_texts, write_texts
from setfit_kd.evaluation.metrics import measure_quality
from setfit_kd.report.render import render_card, verdict
from setfit_kd.report.summary import compare, read_summary
from setfit_kd.run.pipeline import student_paths
from setfit_kd.run_folder.manifest import versions
from setfit_kd.run_folder.names import baseline_path
from setfit_kd.tasks.classification import Labels

PAGE = "report.html"
MAX_EXAMPLES, MAX_CHARACTERS = 20, 600
EXAMPLE_TITLES = ("Largest disagreements with the teacher", "Errors with the highest confidence")
STUDENTS = ("student", "static-8")
TEXTS = [f"text {i}" for i in range(305)]
CARD_MODELS = {"teacher": 50, "student": 40}

HOSTILE = {
    "<script>alert(1)</script> breaks in": None,
    "a cell ends </td></table> here, and <b>bold": None,
    "<!-- no comment --> <![CDATA[x]]> <?php ?> </style>": None,
    "line\u2028separator\u2029and paragraph": "line separator and paragraph",
    "x" * 100_000: "x" * (MAX_CHARACTERS - 1) + "…",
    "turned \u202e round \u2066 and \u200f back": "turned round and back",
    "اَلْعَرَبِيَّةُ نصّ و1234": None,
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f \x85": "nul bell escape [31m delete",
    "{{ 7*7 }} {% raw %} {# note #}": None,
    "&lt;b&gt; &amp; &#60; &copy": None,
}
"""Texts, with the text that the report shows if it differs; at most `MAX_EXAMPLES`, so that all are shown."""
HOSTILE_LABELS = {"</td></table> | `x` **b** [l](x) &lt; {{ 7*7 }} $HOME": None, "<script>alert(2)</script>": None,
                  "c\u202ed\0" + "L" * 20_000: "c d " + "L" * 75 + "…"}  # fmt: skip
SHOWN_LABELS = [shown_as or label for label, shown_as in HOSTILE_LABELS.items()]


@pytest.fixture(scope="module")
def two_students(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "two_students"
    settings = {**FAST, "teacher": str(tiny_teacher), "pool_size": 48, "cache": False}
    distill(*["bundled:newswire"] * 3, **settings, student=[str(tiny_student), "static:8"], output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def not_evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(fake_run(tmp_path_factory.mktemp("runs") / "not_evaluated", {}, eval=None))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on hostile texts, in which the student is always wrong and the teacher always correct."""
    folder, n_correct = tmp_path_factory.mktemp("runs") / "hostile", {"teacher": len(HOSTILE), "student": 0}
    return report(fake_run(folder, n_correct, texts=list(HOSTILE), labels=list(HOSTILE_LABELS), confidence=(0.8, 0.9)))


@pytest.fixture
def run_copy(two_students: Path, tmp_path: Path) -> Path:
    """Return a copy of the run with two students, which a test may change."""
    return Path(shutil.copytree(two_students, tmp_path / "run"))


def report(folder: Path) -> Path:
    result = invoke("report", folder)
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def fake_run(
    folder: Path,
    n_correct: Mapping[str, int],
    *,
    texts: Sequence[str] = TEXTS[:60],
    labels: Sequence[str] = ("a", "b", "c"),
    shift: int = 0,
    confidence: tuple[float, float] = (0.9, 0.6),
    cost: Mapping[str, tuple[float, float]] | None = None,
    from_hub: Sequence[str] = ("org/teacher",),
    thresholds: Sequence[float] | None = None,
    seeds: Sequence[int] = (),
    **settings: Any,
) -> Path:
    """Write the folder of a finished run without training any model.

    ``n_correct`` is the number of texts that each model classifies correctly; for the others, it predicts the next
    class. ``shift`` is the class of the first text. ``confidence`` is that of correct and of wrong predictions.
    ``cost`` contains megabytes and texts per second by model. ``thresholds`` make the run multi-label: every fourth
    text has no label, every fifth has the first one in addition; for wrong predictions, every label is the next one.
    """
    sources = {"labeled": "few.csv", "unlabeled": "pool.txt", "eval": "test.csv"}
    config = RunConfig.of(**{**sources, "student": "static:8", "teacher": "org/teacher", **settings})
    students = student_paths(config)
    for path in students.values():
        (folder / path).mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(), "utf-8")
    gold, n = (np.arange(len(texts)) + shift) % len(labels), len(texts)
    true: Labels = gold
    if thresholds is not None:
        true = (gold[:, None] == np.arange(len(labels))) & (np.arange(n) % 4 > 0)[:, None]
        true[::5, 0] = True
    write_texts(LabeledSet(list(texts), true, tuple(labels)), folder / "evaluation")
    reference: Labels | None = None
    for name, count in n_correct.items():
        is_correct = np.arange(n) < count
        predicted = np.where(is_correct, gold, (gold + 1) % len(labels))
        confidences = np.where(is_correct, *confidence)[:, None]
        is_predicted = predicted[:, None] == np.arange(len(labels))
        others = (1 - confidences) / (len(labels) - 1)
        if thresholds is not None:
            predicted = is_predicted = np.where(is_correct[:, None], true, np.roll(true, 1, axis=1))
            others = 1 - confidences
        probabilities = np.where(is_predicted, confidences, others).astype(np.float32)
        megabytes, speed = (cost or {}).get(name, (10.0, 100.0))
        quality = measure_quality(predicted, true, labels, reference, probabilities=probabilities)
        size = Cost(1_000_000, megabytes, speed, "cpu")
        evaluation = Evaluation(
            quality, size, probabilities, true, None if thresholds is None else np.array(thresholds)
        )
        for run in (folder, *(folder / "seeds" / str(seed) for seed in seeds[1:])):
            evaluation.save(run / "evaluation" / name)
        reference = predicted if name == "teacher" else reference
    stage = {"inputs": "", "seconds": 1.0, "out_of_memory": [], "losses": [1.0, 0.9, 0.8] * 20}
    manifest = {
        **{"format": 1, "finished": True, "stages": dict.fromkeys((*n_correct, "signals"), stage)},
        **{"versions": versions(), "students": students, "evaluated": list(n_correct), "seconds": {"teacher": 1.5}},
        "data": {"labeled": 6, "pool": 1234, "evaluation": n, "pool_leaks": 7},
        **{"device": "cpu", "precision": {"name": "fp32", "speedup": None}},
        "revisions": dict.fromkeys(from_hub, "0" * 40),
        **({"seeds": list(seeds)} if seeds else {}),
    }
    (folder / "run.json").write_text(json.dumps(manifest), "utf-8")
    return folder


class Page:
    """A parsed page: its elements, and paragraphs, tables and code by (heading, subheading).

    The body must be well-formed XML.
    """

    def __init__(self, folder: Path) -> None:
        self.source = (folder / PAGE).read_text("utf-8")
        body = self.source[self.source.index("<body>") : self.source.index("</body>") + len("</body>")]
        self.elements = list(ElementTree.fromstring(body).iter())
        self.svg = re.findall(r"<svg\b.*?</svg>", self.source, re.DOTALL)
        self.sections: dict[tuple[str, str], dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        heading = ("", "")
        for element in self.elements:
            text = "".join(element.itertext())
            if element.tag == "h2":
                heading = (text, "")
            elif element.tag in ("h3", "summary"):
                heading = (heading[0], text)
            elif element.tag == "table":
                rows = [["".join(cell.itertext()) for cell in row] for row in element.iter("tr")]
                self.sections[heading]["table"].append(rows)
            elif element.tag in ("h1", "p", "pre"):
                self.sections[heading]["pre" if element.tag == "pre" else "p"].append(text)

    @property
    def plots(self) -> list[list[str]]:
        """Texts of each plot and its legend."""
        figures = [element for element in self.elements if element.tag == "figure"]
        return [[text.strip() for text in figure.itertext() if text.strip()] for figure in figures]


def percent(value: float) -> str:
    return f"{value:.1%}"


def model_name(name: str) -> str:
    group, _, slug = name.partition("/")
    return {"baselines": f"{slug} (baseline)", "students": slug}.get(group, name)


def points(interval: Mapping[str, float]) -> str:
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} points (95% interval {low:+.1f} to {high:+.1f})"


def test_page_shows_metrics_of_every_model(two_students: Path) -> None:
    metrics, sections = read_json(two_students / "metrics.json"), Page(two_students).sections
    headings, *rows = sections["Comparison", ""]["table"][0]
    assert headings[1:] == ["accuracy", "95% CI", "macro-F1", "agreement", "parameters", "MB", "texts/s", "speedup"]
    _, *calibration_rows = sections["Calibration", ""]["table"][0]
    assert len(rows) == len(calibration_rows) == len(metrics) == 5
    for row, calibration_row, (name, model) in zip(rows, calibration_rows, metrics.items(), strict=True):
        low, high = model["accuracy_interval"]
        accuracy, speed = percent(model["accuracy"]), model["texts_per_second"]
        agreement = "" if name == "teacher" else percent(model["agreement"])
        quality = [accuracy, f"{100 * low:.1f}-{100 * high:.1f}", percent(model["macro_f1"]), agreement]
        cost = [f"{model['parameters'] / 1e6:.1f} M", f"{model['megabytes']:.1f}", f"{speed:,.0f}"]
        assert row == [model_name(name), *quality, *cost, f"{speed / metrics['teacher']['texts_per_second']:.1f}"]
        interval = " to ".join(map(percent, model["ece_interval"]))
        assert calibration_row[:4] == [model_name(name), percent(model["ece"]), interval, f"{model['brier']:.3f}"]
        assert calibration_row[5] == accuracy
        labels = list(model["classes"])
        [[headings, *matrix]] = sections["Confusion matrix", model_name(name)]["table"]
        assert headings == ["gold \\ predicted", *labels]
        assert matrix == [[label, *map(str, counts)] for label, counts in zip(labels, model["confusion"], strict=True)]


@pytest.mark.parametrize("name", STUDENTS)
def test_page_shows_results_of_every_student(two_students: Path, name: str) -> None:
    measured, sections = read_json(two_students / "metrics.json")[f"students/{name}"], Page(two_students).sections
    assert set(measured["against"]) == {"teacher", "baseline"}
    for reference, difference in measured["against"].items():
        accuracy, macro_f1 = points(difference["accuracy"]), points(difference["macro_f1"])
        line = f"{name} minus {reference}: accuracy {accuracy}, macro-F1 {macro_f1}."
        assert line in sections["Comparison", ""]["p"]
    [[headings, *rows]] = sections["Results per class", name]["table"]
    assert headings == ["class", "precision", "recall", "F1", "texts"]
    assert rows == [
        [label, *(percent(quality[key]) for key in ("precision", "recall", "f1")), str(quality["support"])]
        for label, quality in measured["classes"].items()
    ]
    assert sections["Calibration", f"Confidence thresholds ({name})"]["table"]


@pytest.mark.parametrize("name", STUDENTS)
def test_examples_are_largest_disagreements_and_most_confident_errors(two_students: Path, name: str) -> None:
    data = read_texts(two_students / "evaluation")
    teacher, student = (
        Evaluation.load(two_students / "evaluation" / model).probabilities for model in ("teacher", f"students/{name}")
    )
    labels, gold = data.label_names, data.labels

    def example(row: Any) -> list[str]:
        predictions = (f"{labels[model[row].argmax()]} {model[row].max():.0%}" for model in (student, teacher))
        return [data.texts[row], labels[gold[row]], *predictions]

    distance, predicted = np.abs(student - teacher).sum(axis=1), student.argmax(axis=1)
    disagreements = sorted(np.flatnonzero(predicted != teacher.argmax(axis=1)), key=lambda row: -distance[row])
    errors = sorted(np.flatnonzero(predicted != gold), key=lambda row: -student[row].max())
    sections = Page(two_students).sections
    for title, expected in zip(EXAMPLE_TITLES, (disagreements, errors), strict=True):
        assert len(expected) > MAX_EXAMPLES
        [[headings, *shown_rows]] = sections[f"{title} ({name})", ""]["table"]
        assert headings == ["text", "gold", "student", "teacher"]
        assert shown_rows == [example(row) for row in expected[:MAX_EXAMPLES]]


@pytest.mark.parametrize("name", ["two_students", "not_evaluated"])
def test_run_details_and_usage(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    is_evaluated = name == "two_students"
    sections, manifest = Page(folder).sections, read_json(folder / "run.json")
    assert sections["", ""]["p"][0] == f"Distillation report: {name}"
    [settings] = sections["Run details", "Settings"]["pre"]
    assert settings.strip() == (folder / "config.yaml").read_text("utf-8").strip()
    revisions = {} if is_evaluated else manifest["revisions"]
    assert dict(sections["Run details", "Versions"]["table"][0][1:]) == {**manifest["versions"], **revisions}
    values = dict(sections["Run details", "Data and time"]["table"][0][1:])
    assert {f"{stage}, seconds": f"{n:,.1f}" for stage, n in manifest["seconds"].items()}.items() <= values.items()
    assert (values["device"], values["precision"]) == ("cpu", "fp32")
    assert (sections["Memory", ""]["p"], sections["Memory", ""]["table"]) == (["No out-of-memory errors."], [])
    if not is_evaluated:
        names = ("labeled texts", "pool texts", "pool texts removed (in the evaluation set)")
        assert [values[name] for name in names] == ["6", "1,234", "7"]
        assert sections["", ""]["p"][2] == "No results: the run has no evaluation set."
    paths = ["/students/student", "/students/static-8"] if is_evaluated else [""]
    for example, path in zip(sections["How to use the student", ""]["pre"], paths, strict=True):
        assert example.splitlines()[:2] == [
            f'setfit-kd predict {folder}{path} "..."',
            f"setfit-kd export {folder}{path} --output-dir bundle",
        ]
        assert example.endswith(f'load({str(folder) + path!r}).predict(["..."])')


def test_report_lists_out_of_memory_errors_and_no_examples(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", {"teacher": 60, "student": 60}, baseline=False)
    batch = {"device": "cuda:0", "texts": 64}
    event = {"phase": "Training teacher", "step": 7, "from": batch, "to": {**batch, "texts": 32}}
    on_cpu = {"phase": "Scoring pool", "step": None, "from": batch, "to": {**batch, "device": "cpu"}}
    update(out_of_memory=[event, on_cpu])(folder)
    sections = Page(report(folder)).sections
    for title in EXAMPLE_TITLES:  # no text is misclassified
        assert (sections[title, ""]["p"], sections[title, ""]["table"]) == (["None."], [])
    assert sections["Memory", ""]["table"][0][1:] == [
        ["Training teacher", "7", "batch size 64 on cuda:0", "batch size 32 on cuda:0"],
        ["Scoring pool", "", "batch size 64 on cuda:0", "batch size 64 on cpu"],
    ]


def test_many_classes_show_worst_classes_and_most_frequent_confusions(tmp_path: Path) -> None:
    n_correct, labels = {"teacher": 300, "baseline": 37, "student": 200}, [f"class {i}" for i in range(150)]
    folder = report(fake_run(tmp_path / "run", n_correct, texts=TEXTS, labels=labels))
    sections = Page(folder).sections
    qualities = {name: Evaluation.load(folder / "evaluation" / name).quality for name in n_correct}
    classes = {name: percent(result.f1) for name, result in qualities["student"].classes.items()}
    [[_, *shown]] = sections["Results per class", ""]["table"]
    assert sections["Results per class", ""]["p"] == ["The 10 classes with the lowest F1, of 150:"]
    assert [float(row[3][:-1]) for row in shown] == sorted(float(f1[:-1]) for f1 in classes.values())[:10]
    [[_, *folded]] = sections["Results per class", "All classes"]["table"]
    assert {name: f1 for name, _, _, f1, _ in folded} == classes
    folded_tables = iter(sections["Most frequent confusions", "Further confusions"]["table"])
    for name, quality in qualities.items():
        counts = np.array(quality.confusion)
        pairs = sorted(counts[~np.eye(150, dtype=bool) & (counts > 0)], reverse=True)
        [[headings, *rows]] = sections["Most frequent confusions", name]["table"]
        assert headings == ["gold", "predicted", "texts", "share of the gold class"]
        if len(pairs) > 10:  # not for the teacher
            assert [int(row[2]) for row in next(folded_tables)[1:]] == pairs[10:100]
        assert [int(row[2]) for row in rows] == pairs[:10]
        for gold, predicted, n, share in rows:
            of_gold = counts[labels.index(gold)]
            assert (of_gold[labels.index(predicted)], share) == (int(n), percent(int(n) / of_gold.sum()))


def test_threshold_table(tmp_path: Path, hostile: Path) -> None:
    n_correct = {"teacher": 200, "baseline": 150, "student": 150}
    folder = report(fake_run(tmp_path / "run", n_correct, texts=TEXTS[:200], target_accuracy=0.97))
    [[_, *rows]] = Page(folder).sections["Calibration", "Confidence thresholds"]["table"]
    assert [row[0] for row in rows] == ["90.0%", "95.0%", "97.0%", "99.0%"]
    z = 1.959964  # Wilson interval for 150 correct answers out of 150
    for _, threshold, coverage, interval in rows:
        assert 0.6 < float(threshold) <= np.float32(0.9)
        assert (coverage, interval) == ("75.0%", f"{150 / (150 + z * z):.1%} to 100.0%")
    [[_, *rows]] = Page(hostile).sections["Calibration", "Confidence thresholds"]["table"]
    assert rows == [[target, "not reached", "", ""] for target in ("90.0%", "95.0%", "99.0%")]


def test_verdict_compares_accuracy_speed_and_size(tmp_path: Path) -> None:
    def text(teacher: int, baseline: int, cost: dict[str, tuple[float, float]]) -> str:
        models = {"teacher": teacher, "baseline": baseline, "student": 150}
        return verdict(read_summary(fake_run(tmp_path / str(teacher), models, texts=TEXTS[:200], cost=cost)))

    below = text(180, 150, {"teacher": (200.0, 1.0), "student": (0.0, 2345.0)})
    assert below.startswith("The student has an accuracy of 75.0%, 15.0 points below its teacher (95% interval -")
    assert below.endswith(
        " at 2,345.0 times the speed and 0.05% of the size. "
        "Its accuracy is the same as that of the baseline trained on the labels only."
    )
    same = text(150, 149, {"teacher": (10.0, 100.0), "student": (20.0, 50.0)})
    assert "75.0%, the same as that of its teacher, at 0.5 times the speed and 200% of the size. " in same
    assert "Its accuracy is 0.5 points above the baseline trained on the labels only (95% interval " in same
    assert [", not significant)." in sentence for sentence in (below, same)] == [False, True]


THRESHOLDS = (0.3, 0.5, 0.55)


def test_page_of_multi_label_run(tmp_path: Path) -> None:
    models = {"teacher": 200, "baseline": 120, "student": 150}
    folder = fake_run(
        tmp_path / "run", models, texts=TEXTS[:200], thresholds=THRESHOLDS, confidence=(0.9, 0.75), seeds=(0, 1)
    )
    sections = Page(report(folder)).sections
    evaluations = {name: Evaluation.load(folder / "evaluation" / name) for name in models}
    student = evaluations["student"]
    headings, *rows = sections["Comparison", ""]["table"][0]
    assert headings[1:6] == ["macro-F1", "95% CI", "micro-F1", "exact match", "agreement"]
    for row, (name, evaluation) in zip(rows, evaluations.items(), strict=True):
        quality, interval = evaluation.quality, evaluation.intervals["macro_f1"]
        assert quality.micro_f1 is not None
        range_ = f"{100 * interval.low:.1f}-{100 * interval.high:.1f}"
        assert row[:5] == [
            name,
            percent(quality.macro_f1),
            range_,
            percent(quality.micro_f1),
            percent(quality.accuracy),
        ]
    [text] = [line for line in sections["", ""]["p"] if line.startswith("The student has a macro-F1 of ")]
    difference = student.difference_to(evaluations["teacher"])["macro_f1"]
    assert f"of {percent(student.quality.macro_f1)}, {abs(100 * difference.value):.1f} points below its teacher" in text
    assert "Its macro-F1 is " in text
    assert "seeds, the macro-F1 of the student is " in text
    [line] = [line for line in sections["Comparison", ""]["p"] if line.startswith("Student minus teacher")]
    assert re.findall(r"[:,] ([a-zF1 -]+) -", line) == ["macro-F1", "micro-F1", "exact match"]
    [[headings, *_], [_, seeds, *_]] = sections["Results over 2 seeds", ""]["table"]
    assert headings[1:4] == ["macro-F1", "micro-F1", "exact match"]
    assert seeds[0] == "teacher"

    [[headings, *rows]] = sections["Results per label", ""]["table"]
    assert headings[:2] == ["label", "threshold"]
    assert [row[:2] for row in rows] == [["a", "0.30"], ["b", "0.50"], ["c", "0.55"]]
    [[_, *matrix]] = sections["Co-occurrence of gold and predicted labels", "student"]["table"]
    counts = [[str((student.gold[:, i] & student.predicted[:, j]).sum()) for j in range(3)] for i in range(3)]
    assert [row[1:] for row in matrix] == counts
    assert ("Calibration", "Confidence thresholds") not in sections
    assert not any("coverage" in text for plot in Page(folder).plots for text in plot)
    [[_, *errors]] = sections["Errors with the highest confidence", ""]["table"]
    assert [row[0] for row in errors] == [TEXTS[row] for row in np.flatnonzero(~is_exact(student))[:20]]
    names = {", ".join(np.array(list("abc"))[row]) or "none" for row in student.gold[~is_exact(student)][:20]}
    assert {row[1] for row in errors} == names >= {"a, c"}

    content = (folder / "student" / "README.md").read_text("utf-8")
    results = read_header(content)[1].eval_results
    assert [(result.metric_type, result.metric_name) for result in results] == [
        ("f1", "macro-F1"),
        ("f1", "micro-F1"),
        ("accuracy", "exact match"),
    ]
    assert "| c | 0.55 | " in content
    assert "for any of the labels a, b, c" in content
    assert "top_k=None" in content


def is_exact(evaluation: Evaluation) -> Any:
    return (evaluation.predicted == evaluation.gold).all(axis=1)


def test_multi_label_text_without_labels_is_shown_as_none(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", CARD_MODELS, thresholds=(0.05, 0.5, 0.5), baseline=False)
    [[_, *errors]] = Page(report(folder)).sections["Errors with the highest confidence", ""]["table"]
    assert ["text 44", "none", "a 14%", "a 8%"] in errors


def test_best_of_many_students_with_unusual_names(tmp_path: Path) -> None:
    students = ["models/teacher", "models/_mine", "models/学生", *(f"org/{'a-long-name' * 5}-{i}" for i in range(9))]
    paths = list(student_paths(RunConfig.of(student=students)).values())
    models = {"teacher": 50, **{path: 40 for student in paths for path in (baseline_path(student), student)}}
    page = Page(report(fake_run(tmp_path / "run", {**models, paths[1]: 45}, student=students)))
    rows = page.sections["Comparison", ""]["table"][0][1:]
    assert [row[1] for row in rows] == ["83.3%", *["66.7%"] * 3, "75.0%", *["66.7%"] * 20]
    assert all(any(text.startswith(row[0]) for text in page.plots[0]) for row in rows)
    _, subtitle, text = page.sections["", ""]["p"]
    assert subtitle == f"Teacher org/teacher; students {', '.join(students)}. setfit-kd 0.1.0, seed 0."
    assert text.startswith(f"The best student, {rows[4][0]}, has an accuracy of 75.0%, 8.3 points below its teacher")


@pytest.fixture(params=["two_students", "hostile", "not_evaluated"])
def page(request: pytest.FixtureRequest) -> Page:
    return Page(request.getfixturevalue(request.param))


def test_page_has_no_scripts_and_no_external_resources(page: Page) -> None:
    tags = set(re.findall(r"<([a-z]\w*)", page.source))
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "a", "base", "image", "foreignobject"}
    for element in page.elements:
        for name, value in element.attrib.items():
            assert not name.startswith("on"), (element.tag, name)
            if name.rpartition("}")[2] in ("src", "href", "action", "srcset", "poster", "data"):
                assert value.startswith("#"), (element.tag, name, value)
    [styles] = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)[:1]
    content = "\n".join([styles, *(value for element in page.elements for value in element.attrib.values())])
    assert "@import" not in content
    assert {url.strip("'\" ")[:1] for url in re.findall(r"url\(([^)]*)\)", content)} <= {"#"}
    assert not re.findall(r"https?://", content)
    [policy] = re.findall(r'"Content-Security-Policy" content="([^"]*)"', page.source)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_plots_are_valid_svg_with_page_colors_and_unique_ids(page: Page) -> None:
    labels = [element.attrib["aria-label"] for element in page.elements if "aria-label" in element.attrib]
    assert len(set(labels)) == len(labels) == len(page.svg) == len(page.plots) >= 1
    for svg in page.svg:
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert re.findall(r"#[0-9a-fA-F]{6}\b|\brgb\(", svg) == []
    ids = Counter(element.attrib["id"] for element in page.elements if "id" in element.attrib)
    assert ids == Counter(set(re.findall(r'(?:href="|url\()#([^")]+)', "\n".join(page.svg))))


def test_models_have_consistent_colors_in_plots(two_students: Path) -> None:
    page, models = Page(two_students), read_json(two_students / "metrics.json")
    assert len(page.plots) == 4
    entries = re.findall(r'<span style="background: (var\(--series-\d+\))"></span>([^<,]+)', page.source)
    assert len({name for _, name in entries}) == len(set(entries)) == len(models)


# Hostile input

CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def test_hostile_text_is_shown_unchanged_or_truncated(hostile: Path) -> None:
    page = Page(hostile)
    for title in EXAMPLE_TITLES:
        [[_, *rows]] = page.sections[title, ""]["table"]
        assert {text: cells for text, *cells in rows} == {
            shown_as or text: [SHOWN_LABELS[i % 3], f"{SHOWN_LABELS[(i + 1) % 3]} 90%", f"{SHOWN_LABELS[i % 3]} 80%"]
            for i, (text, shown_as) in enumerate(HOSTILE.items())
        }
        assert len(rows) == len(HOSTILE)
    assert [row[0] for row in page.sections["Results per class", ""]["table"][0][1:]] == SHOWN_LABELS
    [[headings, *matrix]] = page.sections["Confusion matrix", "student"]["table"]
    assert (headings[1:], [row[0] for row in matrix]) == (SHOWN_LABELS, SHOWN_LABELS)
    assert any(line.startswith("Student minus teacher: ") for line in page.sections["Comparison", ""]["p"])
    assert len(page.source) < 150_000
    assert CONTROL_CHARACTERS.findall(page.source) == []
    assert max(map(len, re.findall(r"\w+", page.source))) < MAX_CHARACTERS


def test_hostile_folder_and_model_names_are_shown_unchanged(tmp_path: Path) -> None:
    name = "</pre><script>alert(1)</script> | b `c` [d](e) *f* $G & &lt; {{ 7*7 }} {% x %}"
    folder_name = name.replace("/", "")
    folder = report(fake_run(tmp_path / folder_name, CARD_MODELS, teacher=name, baseline=False))
    sections = Page(folder).sections
    title, subtitle, _ = sections["", ""]["p"]
    assert title == f"Distillation report: {folder_name}"
    assert subtitle.startswith(f"Teacher {name}; student static:8.")
    [code] = sections["How to use the student", ""]["pre"]
    predict, export, *_ = code.splitlines()
    assert shlex.split(predict)[2] == shlex.split(export)[2] == str(folder)
    content = (folder / "student" / "README.md").read_text("utf-8")
    assert not re.search(r"(?<!\\)<", content)
    assert f"from {PureWindowsPath(name).name}, which" in unescape_markdown(content)


# Model cards


def unescape_markdown(text: str) -> str:
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)


def read_header(content: str) -> Any:
    """Read the metadata of a model card: as YAML, and with huggingface_hub."""
    from huggingface_hub import ModelCard

    before, header, _ = re.split(r"^---$", content, maxsplit=2, flags=re.MULTILINE)
    assert before == ""
    return yaml.safe_load(header), ModelCard(content).data


@pytest.mark.parametrize("name", STUDENTS)
def test_card_has_metrics_of_its_student(two_students: Path, name: str) -> None:
    content = (two_students / "students" / name / "README.md").read_text("utf-8")
    measured = read_json(two_students / "metrics.json")[f"students/{name}"]
    header, data = read_header(content)
    assert header["library_name"] == "setfit"
    assert header["tags"] == ["setfit", "sentence-transformers", "text-classification", "knowledge-distillation"]
    assert header["metrics"] == ["accuracy", "f1"]
    assert "base_model" not in header
    assert {(result.metric_type, result.metric_value) for result in data.eval_results} == {
        ("accuracy", round(measured["accuracy"], 4)),
        ("f1", round(measured["macro_f1"], 4)),
    }
    table = [line[2:-2].split(" | ") for line in content.splitlines() if line.startswith("| ")]
    assert table[1:] == Page(two_students).sections["Comparison", ""]["table"][0][1:]
    assert all(label in content for label in measured["classes"])


@pytest.mark.parametrize(
    ("student", "base_model"),
    [("org/name@v1", "org/name"), ("demo:all-MiniLM-L6-v2", None), ("a folder: #1/\"quoted\" 'é🙂'", None)],
)
def test_card_names_base_model_from_hub_but_no_folder(tmp_path: Path, student: str, base_model: str | None) -> None:
    from_hub = [student] if base_model else []
    folder = fake_run(tmp_path / "run", CARD_MODELS, student=student, baseline=False, from_hub=from_hub)
    assert read_header(render_card(read_summary(folder), student))[0].get("base_model") == base_model


@pytest.mark.parametrize(
    ("name", "public_name"),
    [
        *((name, PureWindowsPath(name).name) for name in (
            "quote \" and ' and \\.csv", "{brace}: [bracket] # &anchor *alias !tag |", "null", "a b " * 60,
            "line\nbreak\n---\n{{ 7*7 }}", "é🙂a\x7fb\x9bc\x85d\ufffee\ufeff.csv", r"C:\secret\folder\test.csv")),
        ("org/data@v1:config[test]", "org/data@v1:config[test]"), ("org/database", "database"),
        ("bundled:newswire", "bundled:newswire"),
    ],
)  # fmt: skip
def test_card_header_has_full_hub_name_but_last_part_of_path(tmp_path: Path, name: str, public_name: str) -> None:
    from_hub = ["datasets/org/data", "datasets/org/data@v1"]
    folder = fake_run(tmp_path / "run", CARD_MODELS, eval=name, baseline=False, from_hub=from_hub)
    header, _ = read_header(render_card(read_summary(folder), "static:8"))
    dataset = header["model-index"][0]["results"][0]["dataset"]
    assert (dataset["name"], dataset["type"]) == (public_name, public_name)


def test_card_of_transformer_names_many_classes_and_teacher(tmp_path: Path, not_evaluated: Path) -> None:
    labels = [f"a class called {i}" for i in range(60)]
    folder = fake_run(tmp_path / "run", CARD_MODELS, labels=labels, baseline=False)
    content = unescape_markdown(render_card(read_summary(folder), "static:8"))
    assert "A transformer for the classes a class called 0, " in content
    assert "distilled by setfit-kd from org/teacher, which was fine-tuned on 6 labeled texts" in content
    assert 'pipeline("text-classification"' in content
    without_results = (not_evaluated / "student" / "README.md").read_text("utf-8")
    header, _ = read_header(without_results)
    assert header["library_name"] == "transformers"
    assert not header.keys() & {"metrics", "model-index", "base_model"}
    assert "| " not in without_results


# setfit-kd report


def test_rewritten_report_equals_that_of_the_run(two_students: Path) -> None:
    before = read_tree(two_students)
    Path("matplotlibrc").write_text("legend.fontsize: 30\nsavefig.bbox: tight\n")  # the user's style is ignored
    for path in (PAGE, *(f"students/{name}/README.md" for name in STUDENTS)):
        (two_students / path).unlink()
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-m", "setfit_kd", "report", str(two_students)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.splitlines() == [verdict(read_summary(two_students)), f"Report: {two_students / PAGE}"]
    assert read_tree(two_students) == before


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def update(**changes: Any) -> Callable[[Path], Any]:
    """Return a function that updates ``run.json``."""
    return lambda folder: (folder / "run.json").write_text(json.dumps({**read_json(folder / "run.json"), **changes}))


def add_class(folder: Path) -> None:
    path = folder / "evaluation" / "texts.jsonl"
    path.write_text(path.read_text("utf-8").replace('"label_names": [', '"label_names": ["more", ', 1), "utf-8")


RESUME = "setfit-kd run --resume {}"
INVALID_ENTRIES: list[dict[str, Any]] = [
    *({"evaluated": None}, {"seeds": ["../1"]}, {"seeds": [0]}, {"out_of_memory": [{}]}),
    *({"students": {"static:8": "students/../../other"}}, {"evaluated": ["teacher", "/tmp"]}),
]


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (shutil.rmtree, "Found no run in ", "Pass the folder of a finished run."),
        (update(finished=False), "is not finished", RESUME),
        (lambda folder: truncate_file(folder / "run.json"), "/run.json: ", "Start a new run in another --output-dir."),
        *((update(**changes), "run.json with this version of setfit-kd", RESUME) for changes in INVALID_ENTRIES),
        (update(students={"static:8": "students/missing"}), "does not list all models", "Start a new run"),
        (update(seeds=[0, 1]), "seeds/1/evaluation/teacher", RESUME),
        (write("config.yaml", b"nonsense: 1"), "nonsense: unknown setting", "Available settings: "),
        (write("evaluation/teacher/probabilities.npy", b""), "Cannot read the evaluation in ", RESUME),
        (write("evaluation/texts.jsonl", b""), "texts.jsonl (", "Evaluate the run again."),
        (add_class, "does not match the evaluation texts", RESUME),
    ],
)  # fmt: skip
def test_unreadable_run_is_rejected_and_not_changed(
    run_copy: Path, change: Callable[[Path], Any], message: str, hint: str
) -> None:
    change(run_copy)
    before = read_tree(run_copy)
    assert_refused(invoke("report", run_copy), message, hint.format(run_copy))
    assert read_tree(run_copy) == before


def test_unwritable_file_raises_error_and_leaves_no_partial_files(run_copy: Path) -> None:
    before, blocked = read_tree(run_copy), "students/static-8/README.md"
    (run_copy / blocked).unlink()
    (run_copy / blocked).mkdir()
    (run_copy / blocked / "mine").write_text("mine")
    result = invoke("report", run_copy)
    assert_refused(result, f"Error: Cannot write {run_copy / blocked}: ")
    assert "--output-dir" not in result.stderr
    assert set(read_tree(run_copy)) == set(before) | {f"{blocked}/mine"}


def test_compare_shows_difference_to_first_student_of_first_run(tmp_path: Path) -> None:
    models = {"teacher": 50, "baseline": 20, "student": 40}
    runs = {
        "one": fake_run(tmp_path / "one", models),
        "reordered": fake_run(tmp_path / "reordered", models, labels=("b", "c", "a"), shift=2),
        "other texts": fake_run(tmp_path / "other texts", models, texts=TEXTS[:59]),
        "other classes": fake_run(tmp_path / "other classes", models, labels=("a", "b", "d")),
        "other labels": fake_run(tmp_path / "other labels", models, shift=1),
        "multi-label": fake_run(tmp_path / "multi-label", models, thresholds=THRESHOLDS),
    }
    compared = compare(list(runs.values()))
    assert [(model.run, model.name) for model in compared] == [(run, name) for run in runs.values() for name in models]
    differences = [model.difference and round(60 * model.difference.value) for model in compared]
    assert differences == [10, -20, None, 10, -20, 0, *[None] * 12]
    first = compared[0].difference
    assert first is not None
    multi_label = [model.difference for model in compare([runs["multi-label"]])]
    assert [difference and difference.value > 0 for difference in multi_label] == [True, False, None]
    assert first.low < first.value < first.high
    result = invoke("compare", runs["one"], runs["reordered"])
    assert result.exit_code == 0, result.stderr
    rows = [line.split()[:4] for line in result.stdout.rstrip().splitlines()[-6:-3]]
    assert {row[0] for row in rows} == {str(runs["one"])}
    cells = [["teacher", "83.3%", "+16.7"], ["baseline", "33.3%", "-33.3"], ["student", "66.7%", "66.7%"]]
    assert [row[1:] for row in rows] == cells


def test_explains_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", CARD_MODELS, baseline=False)
    unevaluated = fake_run(tmp_path / "unevaluated", {}, eval=None)
    assert_refused(invoke("compare", run, unevaluated), "was not evaluated")
    assert_refused(invoke("compare", run, tmp_path / "nowhere"), "Found no run in")
