"""Reports of a run: HTML page, Markdown and model cards."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import FAST, newswire

from setfit_kd import distill
from setfit_kd.cli import main
from setfit_kd.config.run import RunConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.evaluation.cost import Cost
from setfit_kd.evaluation.measure import Evaluation
from setfit_kd.evaluation.metrics import measure_quality
from setfit_kd.evaluation.texts import read_texts, write_texts
from setfit_kd.report.render import render_card, render_markdown, verdict
from setfit_kd.report.summary import read_summary
from setfit_kd.run.pipeline import student_paths
from setfit_kd.run_folder.manifest import versions
from setfit_kd.run_folder.names import baseline_path

PAGE, MARKDOWN = "report.html", "report.md"
KINDS = (PAGE, MARKDOWN)
MAX_EXAMPLES, MAX_CLASSES, MAX_CHARACTERS = 20, 20, 600
EXAMPLE_TITLES = ("Largest disagreements with the teacher", "Errors with the highest confidence")
RUNS = ("two_students", "hostile", "not_evaluated")

Rows = list[list[str]]
Change = Callable[[Path], Any]

N_LONG = 100_000
HOSTILE = {
    "<script>alert(1)</script> breaks in": None,
    "a cell ends </td></table> here, and <b>bold": None,
    "| pipe | and `code` **bold** [link](javascript:x) ![i](http://x/y.png)": None,
    "<img src=http://x/y.png onerror=alert(1)> \" onmouseover=alert(1) '": None,
    "<!-- no comment --> <![CDATA[x]]> <?php ?> </style>": None,
    "two\nlines\r\nand a\ttab": "two lines and a tab",
    "line\u2028separator\u2029and paragraph": "line separator and paragraph",
    "x" * N_LONG: "x" * (MAX_CHARACTERS - 1) + "…",
    "word " * (N_LONG // 5): ("word " * MAX_CHARACTERS)[: MAX_CHARACTERS - 1] + "…",
    "u" * 500: None,
    "turned \u202e round \u2066 and \u200f back": "turned round and back",
    "اَلْعَرَبِيَّةُ نصّ و1234": None,
    "family 👩‍👩‍👧‍👦 and flag 🏳️‍🌈": None,
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f \x85": "nul bell escape [31m delete",
    "{{ 7*7 }} {% raw %} {# note #}": None,
    "$HOME $x$ ~~gone~~ # heading > quote": None,
    "&lt;b&gt; &amp; &#60; &copy": None,
    "a back\\slash, \\| and \\<b> and \\": None,
    "__dunder__ 1. - * + = :---|": None,
}
"""Texts, with the text that the report shows if it differs; at most `MAX_EXAMPLES`, so that all are shown."""
HOSTILE_LABELS = ("</td></table> | `x` **b** [l](x) &lt; {{ 7*7 }} $HOME", "<script>alert(2)</script>", "مرحبا")


# Runs


@pytest.fixture(scope="module")
def base_settings(tiny_teacher: Path) -> dict[str, Any]:
    return {**FAST, "teacher": str(tiny_teacher), "pool_size": 48, "cache": False}


@pytest.fixture(scope="module")
def two_students(tmp_path_factory: pytest.TempPathFactory, base_settings: dict[str, Any], tiny_student: Path) -> Path:
    """Return the folder of a run with two students."""
    folder = tmp_path_factory.mktemp("runs") / "two_students"
    distill(*["bundled:newswire"] * 3, **base_settings, student=[str(tiny_student), "static:8"], output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def not_evaluated(tmp_path_factory: pytest.TempPathFactory, base_settings: dict[str, Any]) -> Path:
    """Return the folder of a run without an evaluation set."""
    folder = tmp_path_factory.mktemp("runs") / "not_evaluated"
    distill("bundled:newswire", "bundled:newswire", **base_settings, student="static:8", output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, base_settings: dict[str, Any]) -> Path:
    """Return a run on hostile texts, edited so that the student is always wrong and the teacher always correct."""
    folder = tmp_path_factory.mktemp("runs") / "hostile"
    texts = [row["text"] for row in newswire("train")[:80]]
    distill(
        [(text, HOSTILE_LABELS[i % 3]) for i, text in enumerate(texts[:24])],
        texts[24:],
        [(text, HOSTILE_LABELS[i % 3]) for i, text in enumerate(HOSTILE)],
        **{**base_settings, "shots": 4, "pool_size": None},
        student="static:8",
        output_dir=folder,
    )
    gold = Evaluation.load(folder / "evaluation" / "student").gold
    for name, shift, confidence in (("teacher", 0, 0.8), ("student", 1, 0.9)):
        probabilities = make_probabilities((gold + shift) % 3, 3, np.full(len(gold), confidence))
        np.save(folder / "evaluation" / name / "probabilities.npy", probabilities)
    assert run_report(folder).exit_code == 0
    return folder


@pytest.fixture
def run_copy(two_students: Path, tmp_path: Path) -> Path:
    """Return a copy of the run with two students, which a test may change."""
    return Path(shutil.copytree(two_students, tmp_path / "run"))


def run_report(folder: Path) -> Result:
    return CliRunner().invoke(main, ["report", str(folder)])


def read_sections(folder: Path, kind: str) -> dict[tuple[str, str], Section]:
    return read_page(folder).sections if kind == PAGE else read_markdown((folder / MARKDOWN).read_text("utf-8"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def update_manifest(folder: Path, **changes: Any) -> None:
    """Update ``run.json``; a value of None removes the key."""
    manifest = {**read_json(folder / "run.json"), **changes}
    manifest = {name: value for name, value in manifest.items() if value is not None}
    (folder / "run.json").write_text(json.dumps(manifest), "utf-8")


def make_probabilities(
    predicted: npt.NDArray[np.int64], n_classes: int, confidence: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    probabilities = np.repeat((1 - confidence)[:, None] / (n_classes - 1), n_classes, axis=1)
    probabilities[np.arange(len(predicted)), predicted] = confidence
    return probabilities.astype(np.float32)


def fake_run(
    folder: Path,
    n_correct: Mapping[str, int],
    *,
    n: int = 200,
    labels: Sequence[str] = ("a", "b", "c"),
    confidence: tuple[float, float] = (0.9, 0.6),
    cost: Mapping[str, tuple[float, float]] | None = None,
    from_hub: Sequence[str] = ("org/teacher",),
    **settings: Any,
) -> Path:
    """Write the folder of a finished run without training any model.

    Args:
        folder: The run folder.
        n_correct: For each model, by its name in ``metrics.json``, the number of texts that it classifies correctly;
            it predicts the next class for the remaining texts.
        n: Number of texts.
        labels: Names of the classes.
        confidence: Confidence of correct and of wrong predictions.
        cost: Megabytes and texts per second, by model.
        from_hub: Models and data sets that came from the hub.
        settings: Settings of the run.
    """
    sources = {"labeled": "few.csv", "unlabeled": "pool.txt", "eval": "test.csv"}
    config = RunConfig.of(**{**sources, "student": "static:8", "teacher": "org/teacher", **settings})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(), "utf-8")
    students = student_paths(config)
    for path in students.values():
        (folder / path).mkdir(parents=True)
    gold = np.arange(n) % len(labels)
    write_texts(LabeledSet([f"text {i}" for i in range(n)], gold, tuple(labels)), folder / "evaluation")
    reference: npt.NDArray[np.int64] | None = None
    for name, count in n_correct.items():
        is_correct = np.arange(n) < count
        predicted = np.where(is_correct, gold, (gold + 1) % len(labels))
        probabilities = make_probabilities(predicted, len(labels), np.where(is_correct, *confidence))
        megabytes, speed = (cost or {}).get(name, (10.0, 100.0))
        quality = measure_quality(predicted, gold, labels, reference)
        evaluation = Evaluation(quality, Cost(1_000_000, megabytes, speed, "cpu"), probabilities, gold)
        evaluation.save(folder / "evaluation" / name)
        reference = predicted if name == "teacher" else reference
    manifest = {
        "format": 1,
        "finished": True,
        "stages": {name: {"losses": [1.0, 0.9, 0.8]} for name in (*n_correct, "signals")},
        "versions": versions(),
        "students": students,
        "evaluated": list(n_correct),
        "data": {"labeled": 6, "pool": 1234, "evaluation": n},
        "seconds": {"teacher": 1.5},
        "device": "cpu",
        "precision": {"name": "fp32", "speedup": None},
        "out_of_memory": [],
        "revisions": dict.fromkeys(from_hub, "0" * 40),
    }
    (folder / "run.json").write_text(json.dumps(manifest), "utf-8")
    return folder


# Parsing of the reports


@dataclass
class Section:
    """Content under a heading."""

    paragraphs: list[str] = field(default_factory=list)
    tables: list[Rows] = field(default_factory=list)
    code: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """Parsed page: its elements, its nesting errors, and its sections by (heading, subheading)."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input", "col", "wbr", "source"})
    HEADINGS: Mapping[str, int] = {"h1": 0, "h2": 1, "h3": 2, "summary": 2}
    TEXT_TAGS = (*HEADINGS, "title", "p", "li", "pre", "td", "th", "text", "li")

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.open_tags: list[str] = []
        self.errors: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.styles: list[str] = []
        self.plots: list[dict[str, str]] = []
        self.sections: dict[tuple[str, str], Section] = {}
        self.title = ""
        self._heading = ("", "")
        self._text: list[str] | None = None
        self.feed(source)
        self.close()
        self.errors += [f"{tag} is never closed" for tag in self.open_tags]

    @property
    def section(self) -> Section:
        return self.sections.setdefault(self._heading, Section())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open_tags.append(tag)
        if tag == "svg":
            self.plots.append({"label": self._label()})
        elif tag == "table":
            self.section.tables.append([])
        elif tag == "tr":
            self.section.tables[-1].append([])
        if tag in self.TEXT_TAGS:
            self._text = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if len(attributes) < len(attrs):
            self.errors.append(f"{tag} has an attribute twice")
        self.elements.append((tag, attributes))

    def _label(self) -> str:
        parent = next(attributes for tag, attributes in reversed(self.elements) if tag == "div")
        return parent["aria-label"] if "figure" in self.open_tags and parent.get("role") == "img" else ""

    def handle_data(self, data: str) -> None:
        if self.open_tags and self.open_tags[-1] == "style":
            self.styles.append(data)
        elif self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if not self.open_tags or self.open_tags.pop() != tag:
            self.errors.append(f"</{tag}> does not match the open tag in line {self.getpos()[0]}")
        if tag not in self.TEXT_TAGS or self._text is None:
            return
        text, self._text = "".join(self._text), None
        level = self.HEADINGS.get(tag)
        if tag == "title":
            self.title = text
        elif tag in ("text", "li"):
            self.plots[-1]["text"] = f"{self.plots[-1].get('text', '')}\n{text.strip()}"
        elif level is not None:
            self._heading = ("", "") if level == 0 else (text, "") if level == 1 else (self._heading[0], text)
            self.section.paragraphs += [text] if level == 0 else []
        elif tag in ("td", "th"):
            self.section.tables[-1][-1].append(text)
        else:
            (self.section.code if tag == "pre" else self.section.paragraphs).append(text)

    @property
    def svg(self) -> list[str]:
        return re.findall(r"<svg\b.*?</svg>", self.source, re.DOTALL)


def read_page(folder: Path) -> Page:
    return Page((folder / PAGE).read_text("utf-8"))


def cells(line: str) -> list[str]:
    """Split a row of a Markdown table at unescaped pipes."""
    parts = re.findall(r"((?:\\.|[^\\|])*)\|", line)
    assert not parts[0].strip(), line
    return [part.strip() for part in parts[1:]]


def unescape(line: str) -> str:
    """Remove Markdown escapes."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", line)


def read_markdown(source: str) -> dict[tuple[str, str], Section]:
    """Parse Markdown into sections by (heading, subheading)."""
    sections: dict[tuple[str, str], Section] = {}
    heading, fence, in_table = ("", ""), False, False
    for line in source.splitlines():
        section = sections.setdefault(heading, Section())
        level = len(line) - len(line.lstrip("#"))
        if line.startswith("```"):
            fence = not fence
            section.code += [""] if fence else []
        elif fence:
            section.code[-1] += line + "\n"
        elif line.startswith("|"):
            row = cells(line)
            if not in_table:
                section.tables.append([])
            if not all(re.fullmatch("-+", cell) for cell in row):
                section.tables[-1].append([unescape(cell) for cell in row])
        elif level:
            text = unescape(line[level + 1 :])
            heading = ("", "") if level == 1 else (text, "") if level == 2 else (heading[0], text)
            section.paragraphs += [text] if level == 1 else []
        elif line:
            section.paragraphs.append(unescape(re.sub(r"^\*\*(.*)\*\*$", r"\1", line.removeprefix("- "))))
        in_table = line.startswith("|") and not fence
    return sections


# Content


def percent(value: float) -> str:
    return f"{value:.1%}"


def model_name(name: str) -> str:
    group, _, slug = name.partition("/")
    return {"baselines": f"{slug} (baseline)", "students": slug}.get(group, name)


def points(interval: Mapping[str, float]) -> str:
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} points (95% interval {low:+.1f} to {high:+.1f})"


STUDENTS = ("student", "static-8")
DATA_ROWS = {
    "labeled": "labeled texts",
    "pool": "pool texts",
    "evaluation": "evaluation texts",
    "labeled_duplicates": "labeled texts removed (duplicates)",
    "labeled_conflicts": "labeled texts removed (conflicting labels)",
    "labeled_leaks": "labeled texts removed (in the evaluation set)",
    "pool_duplicates": "pool texts removed (duplicates)",
    "pool_labeled": "pool texts removed (in the labeled texts)",
    "pool_leaks": "pool texts removed (in the evaluation set)",
}


def test_run_writes_page_markdown_and_card_per_student(two_students: Path, not_evaluated: Path) -> None:
    assert (
        read_page(two_students).title
        == read_page(two_students).sections["", ""].paragraphs[0]
        == "Distillation report: two_students"
    )
    assert (
        read_markdown((two_students / MARKDOWN).read_text("utf-8"))["", ""].paragraphs[0]
        == "Distillation report: two_students"
    )
    for student in (
        two_students / "students" / "student",
        two_students / "students" / "static-8",
        not_evaluated / "student",
    ):
        assert "distilled by setfit-kd from" in (student / "README.md").read_text("utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_verdict_comes_first_and_describes_best_student(two_students: Path, kind: str) -> None:
    metrics = read_json(two_students / "metrics.json")
    best = max(STUDENTS, key=lambda name: float(metrics[f"students/{name}"]["accuracy"]))
    measured = metrics[f"students/{best}"]
    text = read_sections(two_students, kind)["", ""].paragraphs[2]
    assert text.startswith(f"The best student, {best}, has an accuracy of {percent(measured['accuracy'])}, ")
    for reference in ("teacher", "baseline"):
        interval = measured["against"][reference]["accuracy"]
        expected = f"(95% interval {100 * interval['low']:+.1f} to {100 * interval['high']:+.1f}"
        assert expected in text or abs(interval["value"]) < 0.0005
    speedup = measured["texts_per_second"] / metrics["teacher"]["texts_per_second"]
    size = measured["megabytes"] / metrics["teacher"]["megabytes"]
    assert f"at {speedup:,.1f} times the speed and {size:.0%} of the size" in text
    assert text == verdict(read_summary(two_students))


@pytest.mark.parametrize("kind", KINDS)
def test_comparison_lists_metrics_of_every_model(two_students: Path, kind: str) -> None:
    metrics = read_json(two_students / "metrics.json")
    headings, *rows = read_sections(two_students, kind)["Comparison", ""].tables[0]
    assert headings[1:] == ["accuracy", "95% CI", "macro-F1", "agreement", "parameters", "MB", "texts/s", "speedup"]
    assert rows == [
        [
            model_name(name),
            percent(model["accuracy"]),
            " to ".join(map(percent, model["accuracy_interval"])),
            percent(model["macro_f1"]),
            "" if name == "teacher" else percent(model["agreement"]),
            f"{model['parameters'] / 1e6:.1f} M",
            f"{model['megabytes']:.1f}",
            f"{model['texts_per_second']:,.0f}",
            f"{model['texts_per_second'] / metrics['teacher']['texts_per_second']:.1f}",
        ]
        for name, model in metrics.items()
    ]
    assert len(rows) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_students_are_compared_with_teacher_and_baseline(two_students: Path, kind: str) -> None:
    metrics = read_json(two_students / "metrics.json")
    lines = read_sections(two_students, kind)["Comparison", ""].paragraphs
    for name in STUDENTS:
        for reference, difference in metrics[f"students/{name}"]["against"].items():
            accuracy, macro_f1 = points(difference["accuracy"]), points(difference["macro_f1"])
            assert f"{name} minus {reference}: accuracy {accuracy}, macro-F1 {macro_f1}." in lines


@pytest.mark.parametrize("kind", KINDS)
def test_results_per_class_of_every_student(two_students: Path, kind: str) -> None:
    metrics = read_json(two_students / "metrics.json")
    for name in STUDENTS:
        [[headings, *rows]] = read_sections(two_students, kind)["Results per class", name].tables
        assert headings == ["class", "precision", "recall", "F1", "texts"]
        assert rows == [
            [label, *(percent(quality[key]) for key in ("precision", "recall", "f1")), str(quality["support"])]
            for label, quality in metrics[f"students/{name}"]["classes"].items()
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_confusion_matrix_of_every_model(two_students: Path, kind: str) -> None:
    sections = read_sections(two_students, kind)
    for name, model in read_json(two_students / "metrics.json").items():
        labels = list(model["classes"])
        [[headings, *rows]] = sections["Confusion matrix", model_name(name)].tables
        assert headings == ["gold \\ predicted", *labels]
        assert rows == [[label, *map(str, counts)] for label, counts in zip(labels, model["confusion"], strict=True)]


def test_calibration_table(two_students: Path) -> None:
    rows = read_sections(two_students, MARKDOWN)["Calibration", ""].tables[0][1:]
    for row, (name, model) in zip(rows, read_json(two_students / "metrics.json").items(), strict=True):
        interval = " to ".join(map(percent, model["ece_interval"]))
        assert row[:4] == [model_name(name), percent(model["ece"]), interval, f"{model['brier']:.3f}"]
        assert row[5] == percent(model["accuracy"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STUDENTS)
def test_examples_are_largest_disagreements_and_most_confident_errors(two_students: Path, name: str, kind: str) -> None:
    data = read_texts(two_students / "evaluation")
    teacher = Evaluation.load(two_students / "evaluation" / "teacher").probabilities
    student = Evaluation.load(two_students / "evaluation" / "students" / name).probabilities
    labels, gold = data.label_names, data.labels

    def example(row: int) -> list[str]:
        predictions = (f"{labels[model[row].argmax()]} {model[row].max():.0%}" for model in (student, teacher))
        return [data.texts[row], labels[gold[row]], *predictions]

    disagreements = [row for row in range(len(data)) if student[row].argmax() != teacher[row].argmax()]
    errors = [row for row in range(len(data)) if student[row].argmax() != gold[row]]
    disagreements = sorted(disagreements, key=lambda row: -float(np.abs(student[row] - teacher[row]).sum()))
    errors = sorted(errors, key=lambda row: -float(student[row].max()))
    sections = read_sections(two_students, kind)
    for title, expected in zip(EXAMPLE_TITLES, (disagreements, errors), strict=True):
        assert len(expected) > MAX_EXAMPLES
        [[headings, *shown_rows]] = sections[f"{title} ({name})", ""].tables
        assert headings == ["text", "gold", "student", "teacher"]
        assert shown_rows == [example(row) for row in expected[:MAX_EXAMPLES]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUNS)
def test_run_details_list_settings_versions_data_and_times(
    name: str, kind: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    sections, manifest = read_sections(folder, kind), read_json(folder / "run.json")
    heading = "Run details"
    [settings] = sections[heading, "Settings"].code
    assert settings.strip() == (folder / "config.yaml").read_text("utf-8").strip()
    assert sections[heading, "Versions"].tables[0][1:] == [list(item) for item in manifest["versions"].items()]
    assert {"python", "setfit-kd", "torch", "setfit"} <= set(manifest["versions"])
    values = dict(sections[heading, "Data and time" if kind == PAGE else ""].tables[0][1:])
    seconds = {f"{stage}, seconds": f"{value:,.1f}" for stage, value in manifest["seconds"].items()}
    assert seconds.items() <= values.items()
    assert {DATA_ROWS[name]: str(count) for name, count in manifest["data"].items()}.items() <= values.items()
    assert (values["device"], values["precision"]) == ("cpu", "fp32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "paths"),
    [("two_students", ["students/student", "students/static-8"]), ("hostile", [""]), ("not_evaluated", [""])],
)
def test_usage_example_refers_to_loadable_folder(
    name: str, paths: list[str], kind: str, request: pytest.FixtureRequest
) -> None:
    from setfit_kd.models.io import classifier_folder

    folder: Path = request.getfixturevalue(name)
    examples = read_sections(folder, kind)["How to use the student", ""].code
    for example, path in zip(examples, paths, strict=True):
        student = str(folder / path)
        predict, export, _, import_line, load_line = example.strip().splitlines()
        assert predict == f'setfit-kd predict {student} "..."'
        assert export.startswith(f"setfit-kd export {student} --output-dir ")
        compile(f"{import_line}\n{load_line}", "usage", "exec")
        assert repr(student) in load_line
        assert (classifier_folder(student) / "config_setfit.json").is_file()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["two_students", "not_evaluated"])
def test_report_without_out_of_memory_errors(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    memory = read_sections(request.getfixturevalue(name), kind)["Memory", ""]
    assert (memory.paragraphs, memory.tables) == (["No out-of-memory errors."], [])


def test_report_lists_out_of_memory_errors(run_copy: Path) -> None:
    event = {"phase": "Training teacher", "step": 7, "from": {"device": "cuda:0", "texts": 64},
             "to": {"device": "cuda:0", "texts": 32}}  # fmt: skip
    on_cpu = {"phase": "Scoring pool", "step": None, "from": {"device": "cuda:0", "texts": 1},
              "to": {"device": "cpu", "texts": 1}}  # fmt: skip
    update_manifest(run_copy, out_of_memory=[event, on_cpu])
    assert run_report(run_copy).exit_code == 0
    for kind in KINDS:
        memory = read_sections(run_copy, kind)["Memory", ""]
        assert memory.tables[0][1:] == [
            ["Training teacher", "7", "batch size 64 on cuda:0", "batch size 32 on cuda:0"],
            ["Scoring pool", "", "batch size 1 on cuda:0", "batch size 1 on cpu"],
        ]
        assert "No out-of-memory errors." not in memory.paragraphs


@pytest.mark.parametrize("kind", KINDS)
def test_report_without_evaluation_set_has_no_results(not_evaluated: Path, kind: str) -> None:
    sections = read_sections(not_evaluated, kind)
    assert sections["", ""].paragraphs[2] == "No results: the run has no evaluation set."
    headings = {heading for heading, _ in sections} - {""}
    assert headings - {"Training"} == {"Memory", "How to use the student", "Run details"}
    assert "%" not in sections["", ""].paragraphs[2]
    if kind == PAGE:
        [plot] = read_page(not_evaluated).plots
        assert "loss" in plot["text"]


@pytest.mark.parametrize("kind", KINDS)
def test_single_student_is_called_student(hostile: Path, kind: str) -> None:
    sections = read_sections(hostile, kind)
    assert sections["", ""].paragraphs[1].startswith("Teacher ")
    assert "; student static:8." in sections["", ""].paragraphs[1]
    assert sections["", ""].paragraphs[2].startswith("The student has an accuracy of ")
    assert all(sections[title, ""].tables for title in EXAMPLE_TITLES)
    assert any(line.startswith("Student minus teacher: ") for line in sections["Comparison", ""].paragraphs)


@pytest.mark.parametrize("n_classes", [MAX_CLASSES, MAX_CLASSES + 1])
def test_many_classes_list_most_frequent_confusions_instead_of_matrix(tmp_path: Path, n_classes: int) -> None:
    n_correct = {"teacher": 200, "baseline": 37, "student": 100}
    labels = [f"class {i}" for i in range(n_classes)]
    title = "Confusion matrix" if n_classes <= MAX_CLASSES else "Most frequent confusions"
    folder = fake_run(tmp_path / "run", n_correct, n=205, labels=labels)
    assert run_report(folder).exit_code == 0
    for kind in KINDS:
        sections = read_sections(folder, kind)
        assert len(sections["Results per class", ""].tables[0]) == 1 + n_classes
        for name in n_correct:
            counts = Evaluation.load(folder / "evaluation" / name).quality.confusion
            [[headings, *rows]] = sections[title, name].tables
            if n_classes <= MAX_CLASSES:
                assert rows == [[label, *map(str, row)] for label, row in zip(labels, counts, strict=True)]
                continue
            assert headings == ["gold", "predicted", "texts"]
            confusions = [n for g, row in enumerate(counts) for p, n in enumerate(row) if n and g != p]
            assert [int(n) for _, _, n in rows] == sorted(confusions, reverse=True)[:MAX_CLASSES]
            for gold, predicted, n in rows:
                assert gold != predicted
                assert counts[labels.index(gold)][labels.index(predicted)] == int(n)


CALIBRATION, THRESHOLDS = "Calibration", "Confidence thresholds"


def thresholds(rows: Rows) -> dict[float, list[str]]:
    """Return the cells of each row by target accuracy in percent."""
    return {float(target.removesuffix("%")): cells for target, *cells in rows[1:]}


def test_threshold_table_shows_coverage_and_interval(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", {"teacher": 200, "baseline": 150, "student": 150}, confidence=(0.9, 0.6))
    rows = thresholds(read_markdown(render_markdown(read_summary(folder)))[CALIBRATION, THRESHOLDS].tables[0])
    assert {90, 95, 99} <= set(rows)
    z = 1.959964  # Wilson interval for 150 correct answers out of 150
    for threshold, coverage, interval in rows.values():
        assert 0.6 < float(threshold) <= np.float32(0.9)
        assert (coverage, interval) == ("75.0%", f"{150 / (150 + z * z):.1%} to 100.0%")


def test_threshold_table_if_target_is_not_reached(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", {"teacher": 200, "baseline": 150, "student": 150}, confidence=(0.6, 0.9))
    rows = thresholds(read_markdown(render_markdown(read_summary(folder)))[CALIBRATION, THRESHOLDS].tables[0])
    assert {90, 95, 99} <= set(rows)
    assert all(row == ["not reached", "", ""] for row in rows.values())


def test_threshold_from_report_reaches_target_accuracy(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", {"teacher": 200, "baseline": 150, "student": 150})
    rng = np.random.default_rng(0)
    evaluation = Evaluation.load(folder / "evaluation" / "student")
    is_correct = evaluation.predicted == evaluation.gold
    confidence = np.where(is_correct, rng.uniform(0.5, 1, 200), rng.uniform(0.4, 0.9, 200))
    probabilities = make_probabilities(evaluation.predicted, 3, confidence)
    np.save(folder / "evaluation" / "student" / "probabilities.npy", probabilities)
    assert run_report(folder).exit_code == 0
    page_rows, rows = (thresholds(read_sections(folder, kind)[CALIBRATION, THRESHOLDS].tables[0]) for kind in KINDS)
    assert page_rows == rows
    for target in (90, 95, 99):
        threshold, coverage, _ = rows[target]
        answered = probabilities.max(axis=1) >= float(threshold)
        assert f"{answered.mean():.1%}" == coverage
        assert is_correct[answered].mean() >= target / 100
        assert 0.1 < answered.mean() < 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STUDENTS)
def test_thresholds_of_every_student(two_students: Path, name: str, kind: str) -> None:
    rows = thresholds(read_sections(two_students, kind)[CALIBRATION, f"{THRESHOLDS} ({name})"].tables[0])
    evaluation = Evaluation.load(two_students / "evaluation" / "students" / name)
    for target in (90, 95, 99):
        point = evaluation.operating_point(target / 100)
        assert rows[target][1] == ("" if point is None else percent(point.coverage))


def test_report_without_errors_and_disagreements(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", {"teacher": 60, "baseline": 60, "student": 60}, n=60)
    assert run_report(folder).exit_code == 0
    for section in (read_sections(folder, kind)[title, ""] for title in EXAMPLE_TITLES for kind in KINDS):
        assert (section.paragraphs, section.tables) == (["None."], [])


@pytest.mark.parametrize(
    ("n_correct", "cost", "expected"),
    [
        ((180, 150, 150), {"teacher": (50.0, 10.0), "student": (10.0, 40.0)},
         ["has an accuracy of 75.0%, 15.0 points below its teacher (95% interval -",
          "at 4.0 times the speed and 20% of the size. ",
          "Its accuracy is the same as that of the baseline trained on the labels only."]),
        ((150, 140, 151), {"teacher": (10.0, 100.0), "student": (20.0, 50.0)},
         ["0.5 points above its teacher (95% interval ", ", not significant), ",
          "at 0.5 times the speed and 200% of the size. ",
          "Its accuracy is 5.5 points above the baseline trained on the labels only"]),
        ((150, None, 150), {},
         ["75.0%, the same as that of its teacher, at 1.0 times the speed and 100% of the size."]),
        ((120, None, 160), {"teacher": (4200.0, 1.0), "student": (2.0, 2345.0)},
         ["20.0 points above its teacher", "at 2,345.0 times the speed and 0.05% of the size."]),
    ],
)  # fmt: skip
def test_verdict_compares_accuracy_speed_and_size(
    tmp_path: Path, n_correct: tuple[int, int | None, int], cost: dict[str, tuple[float, float]], expected: list[str]
) -> None:
    models = {name: n for name, n in zip(("teacher", "baseline", "student"), n_correct, strict=True) if n is not None}
    folder = fake_run(tmp_path / "run", models, cost=cost, baseline="baseline" in models)
    text = verdict(read_summary(folder))
    assert text.startswith("The student has an accuracy of ")
    for part in expected:
        assert part in text, (part, text)
    assert ("the labels only" in text) == ("baseline" in models)
    assert ("not significant" in text) == any("not significant" in part for part in expected)


# HTML page


@pytest.fixture(params=RUNS)
def page(request: pytest.FixtureRequest) -> Page:
    return read_page(request.getfixturevalue(request.param))


def test_page_is_well_formed(page: Page) -> None:
    assert page.errors == []
    assert page.source.startswith("<!doctype html>\n<html lang=")
    assert [tag for tag, _ in page.elements].count("h1") == 1


def test_page_has_no_scripts_and_no_external_resources(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "a", "base", "image", "foreignobject"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
                assert value.startswith(("#", "data:")), (tag, name, value)
            if tag == "meta" and name == "http-equiv":
                assert value == "Content-Security-Policy"
    content = "\n".join([*page.styles, *(value for _, attributes in page.elements for value in attributes.values())])
    assert "@import" not in content
    assert {url.strip("'\" ")[:1] for url in re.findall(r"url\(([^)]*)\)", content)} <= {"#"}
    names = {value for _, attributes in page.elements for name, value in attributes.items() if name.startswith("xmlns")}
    assert set(re.findall(r"https?://[^\s\"'<)]+", content)) <= names


def test_content_security_policy_allows_only_styles_and_data_images(page: Page) -> None:
    [policy] = [
        attributes["content"]
        for _, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(";"))
    assert rules == {"default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:"}


def test_plots_are_valid_svg_and_use_page_colors(page: Page) -> None:
    assert len(page.svg) == len(page.plots) >= 1
    for svg in page.svg:
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert re.findall(r"#[0-9a-fA-F]{6}\b|\brgb\(", svg) == []
        assert set(re.findall(r"var\(--[\w-]+\)", svg)) >= {"var(--line)", "var(--series-1)"}


def test_plots_have_unique_labels_and_valid_references(page: Page) -> None:
    labels = [plot["label"] for plot in page.plots]
    assert all(labels)
    assert len(set(labels)) == len(labels)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    referenced = set(re.findall(r'(?:href="|url\()#([^")]+)', "\n".join(page.svg)))
    assert {name: ids.count(name) for name in referenced} == dict.fromkeys(referenced, 1)
    assert referenced


def test_plots_name_axes_and_models(two_students: Path) -> None:
    models = list(map(model_name, read_json(two_students / "metrics.json")))
    compared = [name for name in models if "(baseline)" not in name]
    expected = [
        (["texts per second", "accuracy, %"], models),
        (["confidence", "accuracy"], compared),
        (["coverage (texts answered), %", "accuracy of the answers, %"], compared),
        (["step", "loss"], models),
    ]
    for plot, (axes, names) in zip(read_page(two_students).plots, expected, strict=True):
        lines = plot["text"].splitlines()
        assert set(axes) <= set(lines)
        # A legend entry may have a value after the name.
        legend = [line for line in lines if line.split(",")[0] in models]
        assert sorted(line.split(",")[0] for line in legend) == sorted(names)


# Hostile input


CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize("title", EXAMPLE_TITLES)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_text_is_shown_unchanged_or_truncated(hostile: Path, kind: str, title: str) -> None:
    [[_, *rows]] = read_sections(hostile, kind)[title, ""].tables
    expected = {
        shown_as or text: [HOSTILE_LABELS[i % 3], f"{HOSTILE_LABELS[(i + 1) % 3]} 90%", f"{HOSTILE_LABELS[i % 3]} 80%"]
        for i, (text, shown_as) in enumerate(HOSTILE.items())
    }
    assert {text: cells for text, *cells in rows} == expected
    assert len(rows) == len(HOSTILE)


@pytest.mark.parametrize("kind", KINDS)
def test_report_is_small_and_has_no_control_characters(hostile: Path, kind: str) -> None:
    source = (hostile / kind).read_text("utf-8")
    assert len(source) < 150_000
    assert CONTROL_CHARACTERS.findall(source) == []
    assert max(map(len, re.findall(r"\w+", source))) < MAX_CHARACTERS


def test_markdown_tables_are_valid_and_escaped(hostile: Path) -> None:
    table: list[list[str]] = []
    fence = False
    n_rows = 0
    for line in (hostile / MARKDOWN).read_text("utf-8").splitlines():
        fence ^= line.startswith("```")
        if fence:
            continue
        assert not re.search(r"(?<!\\)(?:\\\\)*<", line), line
        if not line.startswith("|"):
            assert "|" not in re.sub(r"\\.", "", line), line
            table = []
            continue
        row = cells(line)
        assert line.endswith("|")
        assert len(row) == len(table[0] if table else row), line
        for cell in row:
            assert not set(re.sub(r"\\.", "", cell)) & set("<>[]|`*_{}$&!#~\\"), cell
        table.append(row)
        n_rows += 1
    assert n_rows > 2 * len(HOSTILE)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_class_names_are_shown_unchanged(hostile: Path, kind: str) -> None:
    sections = read_sections(hostile, kind)
    labels = list(read_json(hostile / "metrics.json")["student"]["classes"])
    assert set(labels) == set(HOSTILE_LABELS)
    assert [row[0] for row in sections["Results per class", ""].tables[0][1:]] == labels
    [[headings, *rows]] = sections["Confusion matrix", "student"].tables
    assert (headings[1:], [row[0] for row in rows]) == (labels, labels)


HOSTILE_NAMES = ["</pre><script>alert(1)</script>", "a | b `c` [d](e) *f* $G & &lt;", "{{ 7*7 }} {% x %}"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_folder_and_model_names_are_shown_unchanged(tmp_path: Path, name: str) -> None:
    folder_name = name.replace("/", "")
    folder = fake_run(tmp_path / folder_name, {"teacher": 50, "student": 40}, n=60, teacher=name, baseline=False)
    assert run_report(folder).exit_code == 0
    page = read_page(folder)
    assert page.errors == []
    assert page.title == f"Distillation report: {folder_name}"
    for sections in (page.sections, read_sections(folder, MARKDOWN)):
        title, subtitle, _ = sections["", ""].paragraphs
        assert title == f"Distillation report: {folder_name}"
        assert subtitle.startswith(f"Teacher {name}; student static:8.")
        path = shlex.quote(str(folder))
        assert any(f'setfit-kd predict {path} "..."' in code for code in sections["How to use the student", ""].code)
        assert f"from {PureWindowsPath(name).name}, which" in unescape(
            (folder / "student" / "README.md").read_text("utf-8")
        )


# Model cards


def read_header(content: str) -> Any:
    before, header, _ = re.split(r"^---$", content, maxsplit=2, flags=re.MULTILINE)
    assert before == ""
    return yaml.safe_load(header)


def read_card_data(content: str) -> Any:
    """Read the header with huggingface_hub."""
    from huggingface_hub import ModelCard

    return ModelCard(content).data


@pytest.mark.parametrize("name", STUDENTS)
def test_card_has_metrics_of_its_student(two_students: Path, name: str) -> None:
    content = (two_students / "students" / name / "README.md").read_text("utf-8")
    metrics = read_json(two_students / "metrics.json")
    measured = metrics[f"students/{name}"]
    card_header = read_header(content)
    assert (card_header["library_name"], card_header["pipeline_tag"]) == ("setfit", "text-classification")
    assert {"setfit", "text-classification"} <= set(card_header["tags"])
    assert "base_model" not in card_header

    data = read_card_data(content)
    assert (data.library_name, data.pipeline_tag) == ("setfit", "text-classification")
    assert {(result.metric_type, result.metric_value) for result in data.eval_results} == {
        ("accuracy", round(measured["accuracy"], 4)),
        ("f1", round(measured["macro_f1"], 4)),
    }
    assert {result.dataset_name for result in data.eval_results} == {"bundled:newswire"}

    [table] = [table for section in read_markdown(content).values() for table in section.tables]
    assert table == read_sections(two_students, MARKDOWN)["Comparison", ""].tables[0]
    assert all(label in content for label in measured["classes"])


def test_card_without_evaluation_has_no_metrics(not_evaluated: Path) -> None:
    content = (not_evaluated / "student" / "README.md").read_text("utf-8")
    card_header = read_header(content)
    assert (card_header["library_name"], card_header["pipeline_tag"]) == ("setfit", "text-classification")
    assert not card_header.keys() & {"metrics", "model-index", "base_model"}
    assert read_card_data(content).eval_results is None
    assert not any(section.tables for section in read_markdown(content).values())


CARD_MODELS = {"teacher": 50, "student": 40}


@pytest.mark.parametrize(
    ("student", "base_model"),
    [
        ("org/name", "org/name"),
        ("sentence-transformers/paraphrase-MiniLM-L3-v2", "sentence-transformers/paraphrase-MiniLM-L3-v2"),
        ("0rg/1.0", "0rg/1.0"),
        ("org/name@v1", "org/name"),
        ("a/folder", None),
        ("/a/folder", None),
        ("deep/folder/name", None),
        ("a folder: #1/\"quoted\" 'é🙂'", None),
        ("layers:0,2,5", None),
        ("static:8", None),
        ("demo:all-MiniLM-L6-v2", None),
    ],
)
def test_card_names_base_model_from_hub_but_no_folder(tmp_path: Path, student: str, base_model: str | None) -> None:
    from_hub = [] if base_model is None else [student]
    folder = fake_run(tmp_path / "run", CARD_MODELS, n=60, student=student, baseline=False, from_hub=from_hub)
    assert read_header(render_card(read_summary(folder), student)).get("base_model") == base_model


@pytest.mark.parametrize(
    "name",
    [
        "a b.csv",
        "quote \" and ' and \\.csv",
        "colon: # hash.csv",
        "- item",
        "{brace} [bracket] &anchor *alias !tag |",
        "é🙂مرحبا.csv",
        "line\nbreak\ttab\x1b.csv",
        "\n---\n",
        "null",
        "1.0",
        "{{ 7*7 }} {% x %}",
        "<b>&lt;</b>",
        " " + "long " * 60,
    ],
)
def test_card_header_preserves_any_evaluation_set_name(tmp_path: Path, name: str) -> None:
    folder = fake_run(tmp_path / "run", CARD_MODELS, n=60, eval=name, baseline=False)
    content = render_card(read_summary(folder), "static:8")
    [result] = read_header(content)["model-index"][0]["results"]
    public_name = PureWindowsPath(name).name
    assert (result["dataset"]["name"], result["dataset"]["type"]) == (public_name, public_name)
    assert {result.dataset_name for result in read_card_data(content).eval_results} == {public_name}


@pytest.mark.parametrize(
    ("name", "from_hub", "public_name"),
    [
        ("ag_news", ["datasets/ag_news"], "ag_news"),
        ("org/data@v1:config[test]", ["datasets/org/data@v1"], "org/data@v1:config[test]"),
        ("org/database", ["datasets/org/data"], "database"),
        ("bundled:newswire", [], "bundled:newswire"),
        ("secret/folder/test.csv", [], "test.csv"),
        (r"C:\secret\folder\test.csv", [], "test.csv"),
        ("~/folder/test.csv", [], "test.csv"),
    ],
)
def test_card_shows_full_hub_name_but_only_last_part_of_path(
    tmp_path: Path, name: str, from_hub: list[str], public_name: str
) -> None:
    folder = fake_run(tmp_path / "run", CARD_MODELS, n=60, eval=name, baseline=False, from_hub=from_hub)
    [result] = read_header(render_card(read_summary(folder), "static:8"))["model-index"][0]["results"]
    assert result["dataset"]["name"] == public_name


# setfit-kd report


def read_tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["two_students", "not_evaluated"])
def test_rewritten_report_equals_that_of_the_run(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    before = read_tree(folder)
    cards = [path for path in folder.glob("student*/**/README.md") if "distilled by" in path.read_text("utf-8")]
    for path in (folder / PAGE, folder / MARKDOWN, *cards):
        path.unlink()
    result = run_report(folder)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [verdict(read_summary(folder)), f"Report: {folder / PAGE}"]
    assert read_tree(folder) == before
    assert len(cards) == (2 if name == "two_students" else 1)


def test_report_is_reproducible_in_another_process(two_students: Path) -> None:
    before = read_tree(two_students)
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-m", "setfit_kd", "report", str(two_students)],
        capture_output=True, text=True, check=False, env=environment, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert read_tree(two_students) == before


def test_resumed_run_writes_report_again(run_copy: Path) -> None:
    (run_copy / PAGE).unlink()
    distill(resume=run_copy, cache=False)
    assert read_page(run_copy).errors == []
    assert read_page(run_copy).title == "Distillation report: run"


def remove(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def cut_in_half(name: str) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def write(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


NO_RUN = "Found no run in ", "Pass the folder of a finished run."
DAMAGED = "/run.json: ", "Start a new run in another --output-dir."
INVALID_MANIFEST = ("run.json with this version of setfit-kd", "setfit-kd run --resume {}")
NO_EVALUATION = "Cannot read the evaluation in ", "Evaluate again."
NO_TEXTS = "texts.jsonl (", "Evaluate the run again."


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        pytest.param(shutil.rmtree, *NO_RUN, id="no folder"),
        pytest.param(remove("run.json"), *NO_RUN, id="no manifest"),
        pytest.param(remove("config.yaml"), *NO_RUN, id="no config"),
        pytest.param(lambda folder: update_manifest(folder, finished=False), "is not finished",
                     "setfit-kd run --resume {}", id="unfinished"),
        pytest.param(cut_in_half("run.json"), *DAMAGED, id="truncated manifest"),
        pytest.param(write("run.json", b""), *DAMAGED, id="empty manifest"),
        pytest.param(write("run.json", b"[1, 2]"), *INVALID_MANIFEST, id="manifest is a list"),
        pytest.param(write("run.json", b"\xff\xfe\0"), *DAMAGED, id="manifest is not text"),
        pytest.param(
            lambda folder: update_manifest(folder, stages=None), *INVALID_MANIFEST, id="manifest without stages"
        ),
        pytest.param(write("config.yaml", b"a: [b"), "Invalid YAML in", "Write one",
                     id="invalid YAML"),
        pytest.param(write("config.yaml", b"nonsense: 1"), "nonsense: unknown setting", "Available settings: ",
                     id="unknown setting"),
        *(
            pytest.param(change(f"evaluation/{name}"), *expected, id=f"{change.__name__} {name}")
            for change in (remove, cut_in_half)
            for name, expected in {
                "teacher/measured.json": NO_EVALUATION,
                "students/static-8/probabilities.npy": NO_EVALUATION,
                "baselines/static-8/measured.json": NO_EVALUATION,
                "texts.jsonl": NO_TEXTS,
            }.items()
        ),
        pytest.param(write("evaluation/teacher/probabilities.npy", b""), *NO_EVALUATION, id="empty probabilities"),
        pytest.param(write("evaluation/texts.jsonl", b""), *NO_TEXTS, id="empty texts"),
    ],
)  # fmt: skip
def test_unreadable_run_is_rejected_and_not_changed(run_copy: Path, change: Change, message: str, hint: str) -> None:
    change(run_copy)
    before = read_tree(run_copy)
    result = run_report(run_copy)
    assert result.exit_code == 2
    error, hint_line = result.stderr.rstrip("\n").split("\n", maxsplit=1)
    assert error.startswith("Error: ")
    assert message in error
    assert str(run_copy) in error + hint_line or "setting" in error
    assert hint.format(run_copy) in hint_line
    assert read_tree(run_copy) == before


@pytest.mark.parametrize("blocked", [PAGE, MARKDOWN, "students/static-8/README.md"])
def test_unwritable_file_raises_error_and_leaves_no_partial_files(run_copy: Path, blocked: str) -> None:
    before = read_tree(run_copy)
    (run_copy / blocked).unlink()
    (run_copy / blocked).mkdir()
    (run_copy / blocked / "mine").write_text("mine")
    result = run_report(run_copy)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: Cannot write {run_copy / blocked}: ")
    assert len(result.stderr.splitlines()) == 2
    after = read_tree(run_copy)
    assert set(after) == set(before) | {f"{blocked}/mine"}
    assert after[f"{blocked}/mine"] == b"mine"
    if blocked != PAGE:
        assert read_page(run_copy).errors == []


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions are not enforced for this user"
)
def test_read_only_folder_raises_error(run_copy: Path) -> None:
    before = read_tree(run_copy)
    run_copy.chmod(0o555)
    try:
        result = run_report(run_copy)
    finally:
        run_copy.chmod(0o755)
    assert result.exit_code == 2
    assert "No permission to write" in result.stderr
    assert read_tree(run_copy) == before


# Rendering in a browser


class Browser:
    """Chromium, controlled over the WebDriver protocol."""

    ARGUMENTS = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    )

    def __init__(self, chromium: str, port: int, profile: Path) -> None:
        self._url = f"http://127.0.0.1:{port}"
        # The driver runs on this machine: ignore the proxy of the environment.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        options = {"binary": chromium, "args": [*self.ARGUMENTS, f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        capabilities = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        self._wait_for_driver()
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{session['sessionId']}"
        # Ignore the requests of the default page of a new window.
        self._call("POST", f"{self._session}/url", {"url": "about:blank"})
        for kind in logs:
            self.logged(kind)

    def _wait_for_driver(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                if self._call("GET", "/status")["ready"]:
                    return
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data=data, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(f"{path}: {error.read().decode()[:1000]}") from None

    def emulate(self, command: str, **parameters: Any) -> None:
        self._call("POST", f"{self._session}/goog/cdp/execute", {"cmd": f"Emulation.{command}", "params": parameters})

    def open(self, page: Path, *, width: int = 1200, dark: bool = False, media: str = "") -> None:
        self.emulate("setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.emulate("setEmulatedMedia", media=media, features=[scheme])
        self._call("POST", f"{self._session}/url", {"url": page.as_uri()})

    def ask(self, expression: str) -> Any:
        body = {"script": f"return {expression}", "args": []}
        return self._call("POST", f"{self._session}/execute/sync", body)

    def logged(self, kind: str) -> list[dict[str, Any]]:
        """Return the log entries since the last call."""
        entries: list[dict[str, Any]] = self._call("POST", f"{self._session}/se/log", {"type": kind})
        return entries

    def requested(self) -> set[str]:
        events = (json.loads(entry["message"])["message"] for entry in self.logged("performance"))
        return {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}

    def close(self) -> None:
        self._call("DELETE", self._session)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = subprocess.DEVNULL
    with subprocess.Popen([driver, f"--port={port}"], stdout=quiet, stderr=quiet) as process:
        try:
            browser = Browser(chromium, port, tmp_path_factory.mktemp("profile"))
            try:
                yield browser
            finally:
                browser.close()
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


BOXES = (
    "[...document.querySelectorAll('{}')].map(e => {{const r = e.getBoundingClientRect(); return [r.width, r.height]}})"
)
CUT_OFF = """[...document.querySelectorAll('svg')].flatMap(svg => {
    const r = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].filter(text => {
        const t = text.getBoundingClientRect();
        return t.left < r.left - 1 || t.right > r.right + 1 || t.top < r.top - 1 || t.bottom > r.bottom + 1;
    }).map(text => text.textContent)})"""
COLORS = """[...document.querySelectorAll('{}')].map(e => getComputedStyle(e).{})"""


def luminance(color: str) -> float:
    """Compute the relative luminance of a CSS color (WCAG)."""
    match = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", color)
    assert match, color
    parts = [int(part) / 255 for part in match.groups()]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", RUNS)
def test_page_fits_screen_and_requests_no_resources(
    browser: Browser, name: str, width: int, dark: bool, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    browser.open(folder / PAGE, width=width, dark=dark)
    assert browser.logged("browser") == []
    assert {url for url in browser.requested() if not url.startswith("data:")} == {(folder / PAGE).as_uri()}
    assert browser.ask("document.title") == f"Distillation report: {name}"
    assert browser.ask("document.querySelectorAll('script, img, iframe, object, embed, form, a').length") == 0
    assert browser.ask("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [width, True]
    boxes = browser.ask(BOXES.format("svg"))
    assert len(boxes) == (1 if name == "not_evaluated" else 4)
    assert all(100 < side <= width for box in boxes for side in box)
    assert browser.ask("[...document.querySelectorAll('svg')].every(e => e.checkVisibility())")
    assert browser.ask(CUT_OFF) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_contrast_in_light_and_dark_mode(browser: Browser, two_students: Path, dark: bool) -> None:
    browser.open(two_students / PAGE, dark=dark)
    [background] = browser.ask(COLORS.format("body", "backgroundColor"))
    assert luminance(background) < 0.05 if dark else luminance(background) > 0.8
    for selector, css_property, min_contrast in (
        ("body", "color", 7),
        ("td, .verdict, pre", "color", 7),
        (".soft, thead th, figcaption", "color", 4.5),
        ("svg text", "fill", 7),
    ):
        colors = set(browser.ask(COLORS.format(selector, css_property)))
        assert colors
        assert min(contrast(color, background) for color in colors) >= min_contrast, selector
    lines = set(browser.ask(COLORS.format("svg path", "stroke"))) - {"none"}
    assert max(contrast(color, background) for color in lines) >= 3


def test_hostile_text_is_not_markup_in_browser(browser: Browser, hostile: Path) -> None:
    browser.open(hostile / PAGE)
    texts = browser.ask("[...document.querySelectorAll('.texts tbody td:first-child')].map(e => e.textContent)")
    expected = [shown_as or text for text, shown_as in HOSTILE.items()]
    assert sorted(texts) == sorted(expected * 2)


def test_print_shows_all_content(browser: Browser, two_students: Path) -> None:
    browser.open(two_students / PAGE, width=800, media="print")
    assert browser.ask("matchMedia('print').matches")
    selector = "h1, h2, h3, p, figure svg, figcaption, table:not(details *), pre:not(details *)"
    assert all(min(box) > 0 for box in browser.ask(BOXES.format(selector)))
    assert browser.ask(f"[...document.querySelectorAll('{selector}')].every(e => e.checkVisibility())")


def fake_students_run(folder: Path, *students: str) -> Path:
    paths = [
        path
        for name in student_paths(RunConfig.of(student=list(students))).values()
        for path in (baseline_path(name), name)
    ]
    return fake_run(folder, {"teacher": 50, **dict.fromkeys(paths, 40)}, n=60, student=list(students))


def write_report(folder: Path) -> Path:
    result = run_report(folder)
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


def test_page_has_no_duplicate_ids(two_students: Path) -> None:
    ids = Counter(attributes["id"] for _, attributes in read_page(two_students).elements if "id" in attributes)
    assert [name for name, n in ids.items() if n > 1] == []


def test_print_shows_settings_and_versions(browser: Browser, two_students: Path) -> None:
    browser.open(two_students / PAGE, width=800, media="print")
    assert browser.ask("[...document.querySelectorAll('details > *')].every(e => e.checkVisibility())")


def test_legends_with_long_model_names_are_not_cut_off(browser: Browser, tmp_path: Path) -> None:
    names = (
        "sentence-transformers/paraphrase-MiniLM-L3-v2",
        "layers:0,2,5@sentence-transformers/paraphrase-mpnet-base-v2",
    )
    folder = write_report(fake_students_run(tmp_path / "run", *names))
    browser.open(folder / PAGE)
    assert browser.ask(CUT_OFF) == []


def test_long_run_name_does_not_widen_page(browser: Browser, tmp_path: Path) -> None:
    folder = write_report(fake_students_run(tmp_path / ("n" * 80), "static:8"))
    browser.open(folder / PAGE, width=390)
    assert browser.ask("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [390, True]


@pytest.mark.parametrize("kind", KINDS)
def test_student_called_teacher_does_not_replace_teacher(tmp_path: Path, kind: str) -> None:
    folder = write_report(fake_students_run(tmp_path / "run", "models/teacher", "static:8"))
    rows = read_sections(folder, kind)["Comparison", ""].tables[0][1:]
    assert len(rows) == 5
    assert rows[0][1] == "83.3%"  # 50 of 60; the students have 40 of 60


def test_student_name_with_leading_underscore_is_in_legends(tmp_path: Path) -> None:
    folder = write_report(fake_students_run(tmp_path / "run", "models/_mine", "static:8"))
    for plot in read_page(folder).plots[:3]:
        assert "_mine" in plot["text"]


def test_names_in_other_scripts_raise_no_warnings(tmp_path: Path) -> None:
    write_report(fake_students_run(tmp_path / "run", "models/学生", "static:8"))


def test_report_with_many_students(tmp_path: Path) -> None:
    write_report(fake_students_run(tmp_path / "run", *(f"org/a-student-{i}" for i in range(20))))


@pytest.mark.parametrize("student", ["./mine", "../mine", "models/mine"])
def test_folder_is_not_a_base_model(tmp_path: Path, student: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / student).mkdir(parents=True, exist_ok=True)
    folder = fake_run(tmp_path / "run", CARD_MODELS, n=60, student=student, baseline=False)
    assert "base_model" not in read_header(render_card(read_summary(folder), student))


@pytest.mark.parametrize("name", ["a\x7fb.csv", "a\x9bb.csv", "a\ufffeb.csv"])
def test_card_header_with_control_characters(tmp_path: Path, name: str) -> None:
    folder = fake_run(tmp_path / "run", CARD_MODELS, n=60, eval=name, baseline=False)
    assert (
        read_header(render_card(read_summary(folder), "static:8"))["model-index"][0]["results"][0]["dataset"]["name"]
        == name
    )


def test_usage_example_is_quoted_for_the_shell(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "my run", CARD_MODELS, n=60, baseline=False)
    [code] = read_markdown(render_markdown(read_summary(folder)))["How to use the student", ""].code
    predict, export, *_ = code.splitlines()
    assert shlex.split(predict)[2] == shlex.split(export)[2] == str(folder)


@pytest.mark.parametrize(
    "changes",
    [{"evaluated": None}, {"versions": None}, {"data": None}, {"stages": []}, {"stages": {"teacher": {}}},
     {"students": []}, {"students": {"static:8": "students/missing"}}, {"versions": []},
     {"students": {"static:8": "students/../../other"}}, {"students": {"static:8": "/tmp"}},
     {"evaluated": ["teacher", "../../other"]}, {"seeds": ["../1"]}, {"seeds": [0, 1]}, {"seeds": [0]},
     {"precision": "fp32"},
     {"out_of_memory": [{}]}, {"data": []}],
    ids=str,
)  # fmt: skip
def test_invalid_manifest_is_rejected_and_run_not_changed(run_copy: Path, changes: dict[str, Any]) -> None:
    update_manifest(run_copy, **changes)
    before = read_tree(run_copy)
    result = run_report(run_copy)
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (2, True), repr(result.exception)
    assert read_tree(run_copy) == before


def test_texts_that_do_not_match_evaluations_are_rejected(run_copy: Path) -> None:
    path = run_copy / "evaluation" / "texts.jsonl"
    first_line, *rows = path.read_text("utf-8").splitlines(keepends=True)
    header = json.loads(first_line)
    header["label_names"].append("more")
    path.write_text("".join([json.dumps(header) + "\n", *rows]))
    assert isinstance(run_report(run_copy).exception, SystemExit)


def test_control_characters_in_labels_are_removed(tmp_path: Path) -> None:
    folder = write_report(
        fake_run(tmp_path / "run", CARD_MODELS, n=60, labels=["a\0b", "c\u202ed", "L" * 20_000], baseline=False)
    )
    source = (folder / PAGE).read_text("utf-8")
    assert not re.search("[\0-\x08\x0b-\x1f\u202a-\u202e]", source)
    assert len(source) < 300_000


def test_card_names_teacher_with_many_classes(tmp_path: Path) -> None:
    labels = [f"a class called {i}" for i in range(60)]
    folder = fake_run(tmp_path / "run", CARD_MODELS, n=60, labels=labels, baseline=False)
    assert "distilled by setfit-kd from org/teacher" in unescape(render_card(read_summary(folder), "static:8"))


def test_markdown_shows_version_and_seed_with_many_students(tmp_path: Path) -> None:
    folder = fake_students_run(
        tmp_path / "run", *(f"sentence-transformers/some-long-name-of-a-model-{i}" for i in range(12))
    )
    assert read_markdown(render_markdown(read_summary(folder)))["", ""].paragraphs[1].endswith("seed 0.")


@pytest.mark.parametrize("setting", [("legend.fontsize", 30), ("xtick.labelsize", 30), ("savefig.bbox", "tight")])
def test_matplotlib_settings_of_user_do_not_change_page(two_students: Path, setting: tuple[str, Any]) -> None:
    import matplotlib as mpl

    before = (two_students / PAGE).read_bytes()
    with mpl.rc_context(dict([setting])):
        write_report(two_students)
    after = (two_students / PAGE).read_bytes()
    write_report(two_students)
    assert after == before


def test_model_has_same_color_in_all_plots(two_students: Path) -> None:
    colors_by_name: dict[str, set[str]] = {}
    entries = re.findall(
        r'<span style="background: (var\(--series-\d+\))"></span>([^<,]+)', read_page(two_students).source
    )
    assert entries
    for color, name in entries:
        colors_by_name.setdefault(name, set()).add(color)
    assert {name: len(colors) for name, colors in colors_by_name.items()} == dict.fromkeys(colors_by_name, 1)


def test_report_of_student_with_size_zero(tmp_path: Path) -> None:
    costs = {"teacher": (0.5, 100.0), "student": (0.0, 100.0)}
    write_report(fake_run(tmp_path / "run", CARD_MODELS, n=60, cost=costs, baseline=False))


def test_hint_does_not_mention_unavailable_option(run_copy: Path) -> None:
    (run_copy / PAGE).unlink()
    (run_copy / PAGE).mkdir()
    assert "--output-dir" not in run_report(run_copy).stderr


def test_page_and_markdown_have_same_calibration_tables(two_students: Path) -> None:
    page_tables, markdown_tables = (read_sections(two_students, kind)[CALIBRATION, ""].tables for kind in KINDS)
    assert page_tables == markdown_tables
