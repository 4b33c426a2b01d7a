"""What a run tells of itself: as a page, as Markdown and as model cards."""

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
from setfit_kd.config import RunConfig
from setfit_kd.data import LabeledSet
from setfit_kd.evaluation import Evaluation, measure_quality, read_texts, write_texts
from setfit_kd.evaluation.cost import Cost
from setfit_kd.report import read_summary, verdict
from setfit_kd.report.render import card, markdown
from setfit_kd.run import student_paths
from setfit_kd.run_folder import baseline_path, versions

PAGE, MARKDOWN = "report.html", "report.md"
KINDS = (PAGE, MARKDOWN)
MOST_TEXTS, MOST_CLASSES, MOST_CHARACTERS = 20, 20, 600
TEXT_TABLES = ("Where student and teacher disagree most", "The most confident errors")
RUNS = ("two", "turned", "unmeasured")

Rows = list[list[str]]
Change = Callable[[Path], Any]

LONG = 100_000
HOSTILE = {
    "<script>alert(1)</script> breaks in": None,
    "a cell ends </td></table> here, and <b>bold": None,
    "| pipe | and `code` **bold** [link](javascript:x) ![i](http://x/y.png)": None,
    "<img src=http://x/y.png onerror=alert(1)> \" onmouseover=alert(1) '": None,
    "<!-- no comment --> <![CDATA[x]]> <?php ?> </style>": None,
    "two\nlines\r\nand a\ttab": "two lines and a tab",
    "line\u2028separator\u2029and paragraph": "line separator and paragraph",
    "x" * LONG: "x" * (MOST_CHARACTERS - 1) + "…",
    "word " * (LONG // 5): ("word " * MOST_CHARACTERS)[: MOST_CHARACTERS - 1] + "…",
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
"""Texts, and what is shown of them where that is not the text itself; few enough that all of them are shown."""
HOSTILE_LABELS = ("</td></table> | `x` **b** [l](x) &lt; {{ 7*7 }} $HOME", "<script>alert(2)</script>", "مرحبا")


# Runs


@pytest.fixture(scope="module")
def base(tiny_teacher: Path) -> dict[str, Any]:
    return {**FAST, "teacher": str(tiny_teacher), "pool_size": 48, "cache": False}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, base: dict[str, Any], tiny_student: Path) -> Path:
    """A run of two students."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    distill(*["bundled:newswire"] * 3, **base, student=[str(tiny_student), "static:8"], output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory: pytest.TempPathFactory, base: dict[str, Any]) -> Path:
    """A run without an evaluation set."""
    folder = tmp_path_factory.mktemp("runs") / "unmeasured"
    distill("bundled:newswire", "bundled:newswire", **base, student="static:8", output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory, base: dict[str, Any]) -> Path:
    """A run on hostile texts whose student has then been made to be wrong about all of them, the teacher right."""
    folder = tmp_path_factory.mktemp("runs") / "turned"
    words = [row["text"] for row in newswire("train")[:80]]
    distill(
        [(text, HOSTILE_LABELS[i % 3]) for i, text in enumerate(words[:24])],
        words[24:],
        [(text, HOSTILE_LABELS[i % 3]) for i, text in enumerate(HOSTILE)],
        **{**base, "shots": 4, "pool_size": None},
        student="static:8",
        output_dir=folder,
    )
    gold = Evaluation.load(folder / "evaluation" / "student").gold
    for name, turn, confidence in (("teacher", 0, 0.8), ("student", 1, 0.9)):
        said = probabilities((gold + turn) % 3, 3, np.full(len(gold), confidence))
        np.save(folder / "evaluation" / name / "probabilities.npy", said)
    assert report(folder).exit_code == 0
    return folder


@pytest.fixture
def copied(two: Path, tmp_path: Path) -> Path:
    """A copy of the run of two students, to be changed."""
    return Path(shutil.copytree(two, tmp_path / "run"))


def report(folder: Path) -> Result:
    return CliRunner().invoke(main, ["report", str(folder)])


def told_in(folder: Path, kind: str) -> dict[tuple[str, str], Section]:
    return read_page(folder).sections if kind == PAGE else read_markdown((folder / MARKDOWN).read_text("utf-8"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def update_manifest(folder: Path, **what: Any) -> None:
    """Lay something over the run's own account; what is None is taken out."""
    about = {**read_json(folder / "run.json"), **what}
    kept = {name: value for name, value in about.items() if value is not None}
    (folder / "run.json").write_text(json.dumps(kept), "utf-8")


def probabilities(
    predicted: npt.NDArray[np.int64], classes: int, confidence: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    said = np.repeat((1 - confidence)[:, None] / (classes - 1), classes, axis=1)
    said[np.arange(len(predicted)), predicted] = confidence
    return said.astype(np.float32)


def made_run(
    folder: Path,
    right: Mapping[str, int],
    *,
    n: int = 200,
    labels: Sequence[str] = ("a", "b", "c"),
    confidence: tuple[float, float] = (0.9, 0.6),
    cost: Mapping[str, tuple[float, float]] | None = None,
    from_hub: Sequence[str] = ("org/teacher",),
    **settings: Any,
) -> Path:
    """The folder of a run that nobody has run.

    Args:
        folder: Where.
        right: How many of the first texts each model, by its name in ``metrics.json``, is right about; of the others
            it says the next class.
        n: How many texts there are.
        labels: The classes.
        confidence: Of what is right, and of what is wrong.
        cost: Megabytes and texts a second, by model.
        settings: Of the run.
    """
    sources = {"labeled": "few.csv", "unlabeled": "pool.txt", "eval": "test.csv"}
    config = RunConfig.of(**{**sources, "student": "static:8", "teacher": "org/teacher", **settings})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(), "utf-8")
    places = student_paths(config)
    for place in places.values():
        (folder / place).mkdir(parents=True)
    gold = np.arange(n) % len(labels)
    write_texts(LabeledSet([f"text {i}" for i in range(n)], gold, tuple(labels)), folder / "evaluation")
    reference: npt.NDArray[np.int64] | None = None
    for name, rightly in right.items():
        is_right = np.arange(n) < rightly
        predicted = np.where(is_right, gold, (gold + 1) % len(labels))
        said = probabilities(predicted, len(labels), np.where(is_right, *confidence))
        megabytes, speed = (cost or {}).get(name, (10.0, 100.0))
        quality = measure_quality(predicted, gold, labels, reference)
        Evaluation(quality, Cost(1_000_000, megabytes, speed, "cpu"), said, gold).save(folder / "evaluation" / name)
        reference = predicted if name == "teacher" else reference
    about = {
        "format": 1,
        "finished": True,
        "stages": {name: {"losses": [1.0, 0.9, 0.8]} for name in (*right, "signals")},
        "versions": versions(),
        "students": places,
        "evaluated": list(right),
        "data": {"labeled": 6, "pool": 1234, "evaluation": n},
        "seconds": {"teacher": 1.5},
        "device": "cpu",
        "precision": {"name": "fp32", "speedup": None},
        "out_of_memory": [],
        "revisions": dict.fromkeys(from_hub, "0" * 40),
    }
    (folder / "run.json").write_text(json.dumps(about), "utf-8")
    return folder


# Reading what was written


@dataclass
class Section:
    """What stands under a heading."""

    paragraphs: list[str] = field(default_factory=list)
    tables: list[Rows] = field(default_factory=list)
    code: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """A page taken apart: its elements, what is wrong with their nesting, and its sections by their two headings."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input", "col", "wbr", "source"})
    HEADINGS: Mapping[str, int] = {"h1": 0, "h2": 1, "h3": 2, "summary": 2}
    PIECES = (*HEADINGS, "title", "p", "li", "pre", "td", "th", "text", "li")

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.opened: list[str] = []
        self.faults: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.styles: list[str] = []
        self.drawings: list[dict[str, str]] = []
        self.sections: dict[tuple[str, str], Section] = {}
        self.title = ""
        self._heading = ("", "")
        self._text: list[str] | None = None
        self.feed(source)
        self.close()
        self.faults += [f"{tag} is never closed" for tag in self.opened]

    @property
    def section(self) -> Section:
        return self.sections.setdefault(self._heading, Section())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.opened.append(tag)
        if tag == "svg":
            self.drawings.append({"label": self._label()})
        elif tag == "table":
            self.section.tables.append([])
        elif tag == "tr":
            self.section.tables[-1].append([])
        if tag in self.PIECES:
            self._text = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if len(given) < len(attrs):
            self.faults.append(f"{tag} has an attribute twice")
        self.elements.append((tag, given))

    def _label(self) -> str:
        around = next(attributes for tag, attributes in reversed(self.elements) if tag == "div")
        return around["aria-label"] if "figure" in self.opened and around.get("role") == "img" else ""

    def handle_data(self, data: str) -> None:
        if self.opened and self.opened[-1] == "style":
            self.styles.append(data)
        elif self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if not self.opened or self.opened.pop() != tag:
            self.faults.append(f"</{tag}> closes something else, in line {self.getpos()[0]}")
        if tag not in self.PIECES or self._text is None:
            return
        text, self._text = "".join(self._text), None
        level = self.HEADINGS.get(tag)
        if tag == "title":
            self.title = text
        elif tag in ("text", "li"):
            self.drawings[-1]["text"] = f"{self.drawings[-1].get('text', '')}\n{text.strip()}"
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
    """The raw cells of a row of a Markdown table: what is between pipes that are not escaped."""
    pieces = re.findall(r"((?:\\.|[^\\|])*)\|", line)
    assert not pieces[0].strip(), line
    return [piece.strip() for piece in pieces[1:]]


def plain(written: str) -> str:
    """What Markdown shows of a line that has nothing in it but escapes."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", written)


def read_markdown(source: str) -> dict[tuple[str, str], Section]:
    """The sections by their two headings."""
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
                section.tables[-1].append([plain(cell) for cell in row])
        elif level:
            text = plain(line[level + 1 :])
            heading = ("", "") if level == 1 else (text, "") if level == 2 else (heading[0], text)
            section.paragraphs += [text] if level == 1 else []
        elif line:
            section.paragraphs.append(plain(re.sub(r"^\*\*(.*)\*\*$", r"\1", line.removeprefix("- "))))
        in_table = line.startswith("|") and not fence
    return sections


# What is told


def percent(value: float) -> str:
    return f"{value:.1%}"


def shown(name: str) -> str:
    group, _, slug = name.partition("/")
    return {"baselines": f"{slug} (baseline)", "students": slug}.get(group, name)


def signed(interval: Mapping[str, float]) -> str:
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


STUDENTS = ("student", "static-8")


def test_a_run_ends_with_a_page_a_markdown_file_and_a_card_for_each_student(two: Path, unmeasured: Path) -> None:
    assert read_page(two).title == read_page(two).sections["", ""].paragraphs[0] == "Distilled: two"
    assert read_markdown((two / MARKDOWN).read_text("utf-8"))["", ""].paragraphs[0] == "Distilled: two"
    for student in (two / "students" / "student", two / "students" / "static-8", unmeasured / "student"):
        assert "distilled by setfit-kd from" in (student / "README.md").read_text("utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_comes_first_and_is_of_the_best_student(two: Path, kind: str) -> None:
    metrics = read_json(two / "metrics.json")
    best = max(STUDENTS, key=lambda name: float(metrics[f"students/{name}"]["accuracy"]))
    measured = metrics[f"students/{best}"]
    said = told_in(two, kind)["", ""].paragraphs[2]
    assert said.startswith(f"The best student, {best}, is right on {percent(measured['accuracy'])} of the texts, ")
    for other in ("teacher", "baseline"):
        interval = measured["against"][other]["accuracy"]
        told = f"(95 % interval {100 * interval['low']:+.1f} to {100 * interval['high']:+.1f}"
        assert told in said or abs(interval["value"]) < 0.0005
    faster = measured["texts_per_second"] / metrics["teacher"]["texts_per_second"]
    smaller = metrics["teacher"]["megabytes"] / measured["megabytes"]
    assert f"at {faster:,.1f} times the speed and 1/{smaller:,.1f} of the size" in said
    assert said == verdict(read_summary(two))


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_stands_in_the_comparison_as_it_was_measured(two: Path, kind: str) -> None:
    metrics = read_json(two / "metrics.json")
    headings, *rows = told_in(two, kind)["Comparison", ""].tables[0]
    assert headings[1:] == ["accuracy", "95 %", "macro F1", "as teacher", "parameters", "MB", "texts/s", "to teacher"]
    assert rows == [
        [
            shown(name),
            percent(of["accuracy"]),
            " to ".join(map(percent, of["accuracy_interval"])),
            percent(of["macro_f1"]),
            "" if name == "teacher" else percent(of["agreement"]),
            f"{of['parameters'] / 1e6:.1f} M",
            f"{of['megabytes']:.1f}",
            f"{of['texts_per_second']:,.0f}",
            f"{of['texts_per_second'] / metrics['teacher']['texts_per_second']:.1f}",
        ]
        for name, of in metrics.items()
    ]
    assert len(rows) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_every_student_is_set_against_teacher_and_baseline_with_intervals(two: Path, kind: str) -> None:
    metrics = read_json(two / "metrics.json")
    lines = told_in(two, kind)["Comparison", ""].paragraphs
    for name in STUDENTS:
        for other, of in metrics[f"students/{name}"]["against"].items():
            expected = f"{name} and {other}: {signed(of['accuracy'])} points of accuracy, {signed(of['macro_f1'])} of"
            assert any(line.startswith(expected) for line in lines), expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_classes_of_every_student_are_told_one_by_one(two: Path, kind: str) -> None:
    metrics = read_json(two / "metrics.json")
    for name in STUDENTS:
        [[headings, *rows]] = told_in(two, kind)["By class", name].tables
        assert headings == ["class", "precision", "recall", "F1", "texts"]
        assert rows == [
            [label, *(percent(of[figure]) for figure in ("precision", "recall", "f1")), str(of["support"])]
            for label, of in metrics[f"students/{name}"]["classes"].items()
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_confusions_of_every_model_are_counted(two: Path, kind: str) -> None:
    sections = told_in(two, kind)
    for name, of in read_json(two / "metrics.json").items():
        labels = list(of["classes"])
        [[headings, *rows]] = sections["What is taken for what", shown(name)].tables
        assert headings == ["gold \\ predicted", *labels]
        assert rows == [[label, *map(str, counts)] for label, counts in zip(labels, of["confusion"], strict=True)]


def test_calibration_is_told_in_figures(two: Path) -> None:
    said = told_in(two, MARKDOWN)["Can the probabilities be believed?", ""].tables[0][1:]
    for row, (name, of) in zip(said, read_json(two / "metrics.json").items(), strict=True):
        interval = " to ".join(map(percent, of["ece_interval"]))
        assert row[:4] == [shown(name), percent(of["ece"]), interval, f"{of['brier']:.3f}"]
        assert row[5] == percent(of["accuracy"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STUDENTS)
def test_the_texts_shown_are_those_of_most_disagreement_and_of_most_confident_error(
    two: Path, name: str, kind: str
) -> None:
    data = read_texts(two / "evaluation")
    teacher = Evaluation.load(two / "evaluation" / "teacher").probabilities
    student = Evaluation.load(two / "evaluation" / "students" / name).probabilities
    labels, gold = data.label_names, data.labels

    def told(row: int) -> list[str]:
        said = (f"{labels[of[row].argmax()]} {of[row].max():.0%}" for of in (student, teacher))
        return [data.texts[row], labels[gold[row]], *said]

    everything = range(len(data))
    differing = [row for row in everything if student[row].argmax() != teacher[row].argmax()]
    wrong = [row for row in everything if student[row].argmax() != gold[row]]
    furthest = sorted(differing, key=lambda row: -float(np.abs(student[row] - teacher[row]).sum()))
    worst = sorted(wrong, key=lambda row: -float(student[row].max()))
    sections = told_in(two, kind)
    for title, expected in zip(TEXT_TABLES, (furthest, worst), strict=True):
        assert len(expected) > MOST_TEXTS
        [[headings, *shown_rows]] = sections[f"{title} ({name})", ""].tables
        assert headings == ["text", "gold", "student", "teacher"]
        assert shown_rows == [told(row) for row in expected[:MOST_TEXTS]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["two", "turned", "unmeasured"])
def test_settings_versions_data_and_times_are_told(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    sections, about = told_in(folder, kind), read_json(folder / "run.json")
    made = "How it was made"
    [settings] = sections[made, "Settings"].code
    assert settings.strip() == (folder / "config.yaml").read_text("utf-8").strip()
    assert sections[made, "Versions"].tables[0][1:] == [list(item) for item in about["versions"].items()]
    assert {"python", "setfit-kd", "torch", "setfit"} <= set(about["versions"])
    found = dict(sections[made, "Data and time" if kind == PAGE else ""].tables[0][1:])
    assert {
        f"{stage}, seconds": f"{seconds:,.1f}" for stage, seconds in about["seconds"].items()
    }.items() <= found.items()
    assert {f"{what.replace('_', ' ')} texts": str(n) for what, n in about["data"].items()}.items() <= found.items()
    assert (found["device"], found["precision"]) == ("cpu", "fp32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "places"), [("two", ["students/student", "students/static-8"]), ("turned", [""]), ("unmeasured", [""])]
)
def test_the_lines_to_use_a_student_name_what_can_be_loaded(
    name: str, places: list[str], kind: str, request: pytest.FixtureRequest
) -> None:
    from setfit_kd.models import classifier_folder

    folder: Path = request.getfixturevalue(name)
    said = told_in(folder, kind)["How to use the student", ""].code
    for lines, place in zip(said, places, strict=True):
        student = str(folder / place)
        predict, export, _, imported, used = lines.strip().splitlines()
        assert predict == f'setfit-kd predict {student} "..."'
        assert export.startswith(f"setfit-kd export {student} --output-dir ")
        compile(f"{imported}\n{used}", "usage", "exec")
        assert repr(student) in used
        assert (classifier_folder(student) / "config_setfit.json").is_file()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["two", "unmeasured"])
def test_memory_that_never_ran_out_is_said_to_have_lasted(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    memory = told_in(request.getfixturevalue(name), kind)["Memory", ""]
    assert (memory.paragraphs, memory.tables) == (["Memory never ran out."], [])


def test_every_time_that_memory_ran_out_is_told(copied: Path) -> None:
    event = {"phase": "Training teacher", "step": 7, "from": {"device": "cuda:0", "texts": 64},
             "to": {"device": "cuda:0", "texts": 32}}  # fmt: skip
    moved = {"phase": "Scoring pool", "step": None, "from": {"device": "cuda:0", "texts": 1},
             "to": {"device": "cpu", "texts": 1}}  # fmt: skip
    update_manifest(copied, out_of_memory=[event, moved])
    assert report(copied).exit_code == 0
    for kind in KINDS:
        memory = told_in(copied, kind)["Memory", ""]
        assert memory.tables[0][1:] == [
            ["Training teacher", "7", "64 texts on cuda:0", "32 texts on cuda:0"],
            ["Scoring pool", "", "1 texts on cuda:0", "1 texts on cpu"],
        ]
        assert "Memory never ran out." not in memory.paragraphs


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_evaluation_set_nothing_is_claimed_and_the_rest_is_told(unmeasured: Path, kind: str) -> None:
    sections = told_in(unmeasured, kind)
    assert sections["", ""].paragraphs[2] == "Nothing was measured: there was no evaluation set."
    headings = {heading for heading, _ in sections} - {""}
    assert headings - {"Training"} == {"Memory", "How to use the student", "How it was made"}
    assert "%" not in sections["", ""].paragraphs[2]
    if kind == PAGE:
        [drawing] = read_page(unmeasured).drawings
        assert "loss" in drawing["text"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_student_is_called_the_student(turned: Path, kind: str) -> None:
    sections = told_in(turned, kind)
    assert sections["", ""].paragraphs[1].startswith("Teacher ")
    assert "; student static:8." in sections["", ""].paragraphs[1]
    assert sections["", ""].paragraphs[2].startswith("The student is right on ")
    assert all(sections[title, ""].tables for title in TEXT_TABLES)
    assert any(line.startswith("Student and teacher: ") for line in sections["Comparison", ""].paragraphs)


@pytest.mark.parametrize("classes", [MOST_CLASSES, MOST_CLASSES + 1])
def test_with_many_classes_the_most_frequent_confusions_take_the_place_of_the_matrix(
    tmp_path: Path, classes: int
) -> None:
    right = {"teacher": 200, "baseline": 37, "student": 100}
    labels = [f"class {i}" for i in range(classes)]
    folder = made_run(tmp_path / "run", right, n=205, labels=labels)
    assert report(folder).exit_code == 0
    for kind in KINDS:
        sections = told_in(folder, kind)
        assert len(sections["By class", ""].tables[0]) == 1 + classes
        for name in right:
            counts = Evaluation.load(folder / "evaluation" / name).quality.confusion
            [[headings, *rows]] = sections["What is taken for what", name].tables
            if classes <= MOST_CLASSES:
                assert rows == [[label, *map(str, row)] for label, row in zip(labels, counts, strict=True)]
                continue
            assert headings == ["gold", "predicted", "texts"]
            confused = [n for g, row in enumerate(counts) for p, n in enumerate(row) if n and g != p]
            assert [int(n) for _, _, n in rows] == sorted(confused, reverse=True)[:MOST_CLASSES]
            for gold, predicted, n in rows:
                assert gold != predicted
                assert counts[labels.index(gold)][labels.index(predicted)] == int(n)


BELIEVED, SURE = "Can the probabilities be believed?", "Answering only when sure"


def thresholds(rows: Rows) -> dict[float, list[str]]:
    """What is told for each accuracy that is wanted, in percent."""
    return {float(wanted.removesuffix("%")): rest for wanted, *rest in rows[1:]}


def test_a_threshold_is_told_with_its_coverage_and_interval(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", {"teacher": 200, "baseline": 150, "student": 150}, confidence=(0.9, 0.6))
    found = thresholds(read_markdown(markdown(read_summary(folder)))[BELIEVED, SURE].tables[0])
    assert {90, 95, 99} <= set(found)
    z = 1.959964  # Wilson's interval for 150 right answers of 150
    for threshold, coverage, interval in found.values():
        assert 0.6 < float(threshold) <= np.float32(0.9)
        assert (coverage, interval) == ("75.0%", f"{150 / (150 + z * z):.1%} to 100.0%")


def test_where_no_threshold_is_good_enough_this_is_said(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", {"teacher": 200, "baseline": 150, "student": 150}, confidence=(0.6, 0.9))
    found = thresholds(read_markdown(markdown(read_summary(folder)))[BELIEVED, SURE].tables[0])
    assert {90, 95, 99} <= set(found)
    assert all(rest == ["none reaches it", "", ""] for rest in found.values())


def test_a_threshold_taken_from_the_report_keeps_what_it_promises(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", {"teacher": 200, "baseline": 150, "student": 150})
    rng = np.random.default_rng(0)
    evaluation = Evaluation.load(folder / "evaluation" / "student")
    right = evaluation.predicted == evaluation.gold
    confidence = np.where(right, rng.uniform(0.5, 1, 200), rng.uniform(0.4, 0.9, 200))
    said = probabilities(evaluation.predicted, 3, confidence)
    np.save(folder / "evaluation" / "student" / "probabilities.npy", said)
    assert report(folder).exit_code == 0
    found, same = (thresholds(told_in(folder, kind)[BELIEVED, SURE].tables[0]) for kind in KINDS)
    assert found == same
    for wanted in (90, 95, 99):
        threshold, coverage, _ = found[wanted]
        answered = said.max(axis=1) >= float(threshold)
        assert f"{answered.mean():.1%}" == coverage
        assert right[answered].mean() >= wanted / 100
        assert 0.1 < answered.mean() < 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STUDENTS)
def test_thresholds_are_told_of_every_student(two: Path, name: str, kind: str) -> None:
    found = thresholds(told_in(two, kind)[BELIEVED, f"{SURE} ({name})"].tables[0])
    evaluation = Evaluation.load(two / "evaluation" / "students" / name)
    for wanted in (90, 95, 99):
        answering = evaluation.operating_point(wanted / 100)
        assert found[wanted][1] == ("" if answering is None else percent(answering.coverage))


def test_where_there_are_no_errors_and_no_disagreements_this_is_said(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", {"teacher": 60, "baseline": 60, "student": 60}, n=60)
    assert report(folder).exit_code == 0
    for section in (told_in(folder, kind)[title, ""] for title in TEXT_TABLES for kind in KINDS):
        assert (section.paragraphs, section.tables) == (["There are none."], [])


@pytest.mark.parametrize(
    ("right", "cost", "expected"),
    [
        ((180, 150, 150), {"teacher": (50.0, 10.0), "student": (10.0, 40.0)},
         ["is right on 75.0% of the texts, 15.0 points below its teacher (95 % interval -",
          "at 4.0 times the speed and 1/5.0 of the size. ", "It is as the same body trained on the labels alone is."]),
        ((150, 140, 151), {"teacher": (10.0, 100.0), "student": (20.0, 50.0)},
         ["0.5 points above its teacher (95 % interval ", ", within chance), ",
          "at 0.5 times the speed and 2.0 times the size. ", "It is 5.5 points above the same body trained on"]),
        ((150, None, 150), {},
         ["75.0% of the texts, as its teacher is, at 1.0 times the speed and 1/1.0 of the size."]),
        ((120, None, 160), {"teacher": (4200.0, 1.0), "student": (2.0, 2345.0)},
         ["20.0 points above its teacher", "at 2,345.0 times the speed and 1/2,100.0 of the size."]),
    ],
)  # fmt: skip
def test_the_verdict_says_what_is_lost_what_is_gained_and_what_may_be_chance(
    tmp_path: Path, right: tuple[int, int | None, int], cost: dict[str, tuple[float, float]], expected: list[str]
) -> None:
    found = {name: n for name, n in zip(("teacher", "baseline", "student"), right, strict=True) if n is not None}
    folder = made_run(tmp_path / "run", found, cost=cost, baseline="baseline" in found)
    said = verdict(read_summary(folder))
    assert said.startswith("The student is right on ")
    for part in expected:
        start = said.find(part)
        assert start >= 0, (part, said)
    assert ("the labels alone" in said) == ("baseline" in found)
    assert ("within chance" in said) == any("within chance" in part for part in expected)


# The page by itself


@pytest.fixture(params=RUNS)
def page(request: pytest.FixtureRequest) -> Page:
    return read_page(request.getfixturevalue(request.param))


def test_the_page_is_nested_as_it_should_be(page: Page) -> None:
    assert page.faults == []
    assert page.source.startswith("<!doctype html>\n<html lang=")
    assert [tag for tag, _ in page.elements].count("h1") == 1


def test_nothing_on_the_page_runs_or_is_fetched(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "a", "base", "image", "foreignobject"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
                assert value.startswith(("#", "data:")), (tag, name, value)
            if tag == "meta" and name == "http-equiv":
                assert value == "Content-Security-Policy"
    written = "\n".join([*page.styles, *(value for _, attributes in page.elements for value in attributes.values())])
    assert "@import" not in written
    assert {place.strip("'\" ")[:1] for place in re.findall(r"url\(([^)]*)\)", written)} <= {"#"}
    names = {value for _, attributes in page.elements for name, value in attributes.items() if name.startswith("xmlns")}
    assert set(re.findall(r"https?://[^\s\"'<)]+", written)) <= names


def test_the_pages_own_policy_forbids_all_but_its_styles(page: Page) -> None:
    [policy] = [of["content"] for tag, of in page.elements if of.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(";"))
    assert rules == {"default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:"}


def test_the_drawings_are_whole_and_in_the_pages_colours(page: Page) -> None:
    assert len(page.svg) == len(page.drawings) >= 1
    for drawing in page.svg:
        assert ElementTree.fromstring(drawing).tag == "{http://www.w3.org/2000/svg}svg"
        assert re.findall(r"#[0-9a-fA-F]{6}\b|\brgb\(", drawing) == []
        assert set(re.findall(r"var\(--[\w-]+\)", drawing)) >= {"var(--line)", "var(--series-1)"}


def test_every_drawing_is_labelled_and_what_it_refers_to_is_there_once(page: Page) -> None:
    labels = [drawing["label"] for drawing in page.drawings]
    assert all(labels)
    assert len(set(labels)) == len(labels)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', "\n".join(page.svg)))
    assert {name: ids.count(name) for name in used} == dict.fromkeys(used, 1)
    assert used


def test_the_drawings_name_their_axes_and_every_model(two: Path) -> None:
    models = list(map(shown, read_json(two / "metrics.json")))
    compared = [name for name in models if "(baseline)" not in name]
    expected = [
        (["texts a second", "accuracy, %"], models),
        (["confidence", "accuracy"], compared),
        (["texts answered, most confident first, %", "accuracy of the answers, %"], compared),
        (["step", "loss"], models),
    ]
    for drawing, (axes, names) in zip(read_page(two).drawings, expected, strict=True):
        written = drawing["text"].splitlines()
        assert set(axes) <= set(written)
        # The legend may tell a figure after the name.
        legend = [line for line in written if line.split(",")[0] in models]
        assert sorted(line.split(",")[0] for line in legend) == sorted(names)


# Texts that mean harm


CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize("title", TEXT_TABLES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_text_is_shown_as_it_is_or_shortened(turned: Path, kind: str, title: str) -> None:
    [[_, *rows]] = told_in(turned, kind)[title, ""].tables
    expected = {
        shown_as or text: [HOSTILE_LABELS[i % 3], f"{HOSTILE_LABELS[(i + 1) % 3]} 90%", f"{HOSTILE_LABELS[i % 3]} 80%"]
        for i, (text, shown_as) in enumerate(HOSTILE.items())
    }
    assert {text: rest for text, *rest in rows} == expected
    assert len(rows) == len(HOSTILE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_stays_small_and_holds_no_control_characters(turned: Path, kind: str) -> None:
    source = (turned / kind).read_text("utf-8")
    assert len(source) < 150_000
    assert CONTROLS.findall(source) == []
    assert max(map(len, re.findall(r"\w+", source))) < MOST_CHARACTERS


def test_markdown_tables_hold_together_and_nothing_in_them_is_markup(turned: Path) -> None:
    table: list[list[str]] = []
    fence = False
    n_rows = 0
    for line in (turned / MARKDOWN).read_text("utf-8").splitlines():
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
def test_hostile_class_names_are_shown_as_they_are(turned: Path, kind: str) -> None:
    sections = told_in(turned, kind)
    labels = list(read_json(turned / "metrics.json")["student"]["classes"])
    assert set(labels) == set(HOSTILE_LABELS)
    assert [row[0] for row in sections["By class", ""].tables[0][1:]] == labels
    [[headings, *rows]] = sections["What is taken for what", "student"].tables
    assert (headings[1:], [row[0] for row in rows]) == (labels, labels)


HOSTILE_NAMES = ["</pre><script>alert(1)</script>", "a | b `c` [d](e) *f* $G & &lt;", "{{ 7*7 }} {% x %}"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_of_folders_and_models_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    called = name.replace("/", "")
    folder = made_run(tmp_path / called, {"teacher": 50, "student": 40}, n=60, teacher=name, baseline=False)
    assert report(folder).exit_code == 0
    page = read_page(folder)
    assert page.faults == []
    assert page.title == f"Distilled: {called}"
    for sections in (page.sections, told_in(folder, MARKDOWN)):
        title, subtitle, _ = sections["", ""].paragraphs
        assert title == f"Distilled: {called}"
        assert subtitle.startswith(f"Teacher {name}; student static:8.")
        place = shlex.quote(str(folder))
        assert any(f'setfit-kd predict {place} "..."' in code for code in sections["How to use the student", ""].code)
        assert f"from {PureWindowsPath(name).name}, which" in plain(
            (folder / "student" / "README.md").read_text("utf-8")
        )


# Cards


def header(content: str) -> Any:
    begin, written, _ = re.split(r"^---$", content, maxsplit=2, flags=re.MULTILINE)
    assert begin == ""
    return yaml.safe_load(written)


def loaded(content: str) -> Any:
    """The header as the hub's own library reads it."""
    from huggingface_hub import ModelCard

    return ModelCard(content).data


@pytest.mark.parametrize("name", STUDENTS)
def test_a_card_tells_what_its_student_was_measured_to_be(two: Path, name: str) -> None:
    content = (two / "students" / name / "README.md").read_text("utf-8")
    metrics = read_json(two / "metrics.json")
    measured = metrics[f"students/{name}"]
    about = header(content)
    assert (about["library_name"], about["pipeline_tag"]) == ("setfit", "text-classification")
    assert {"setfit", "text-classification"} <= set(about["tags"])
    assert "base_model" not in about

    read = loaded(content)
    assert (read.library_name, read.pipeline_tag) == ("setfit", "text-classification")
    assert {(result.metric_type, result.metric_value) for result in read.eval_results} == {
        ("accuracy", round(measured["accuracy"], 4)),
        ("f1", round(measured["macro_f1"], 4)),
    }
    assert {result.dataset_name for result in read.eval_results} == {"bundled:newswire"}

    [table] = [table for section in read_markdown(content).values() for table in section.tables]
    assert table == told_in(two, MARKDOWN)["Comparison", ""].tables[0]
    assert all(label in content for label in measured["classes"])


def test_the_card_of_a_student_that_was_not_measured_claims_nothing(unmeasured: Path) -> None:
    content = (unmeasured / "student" / "README.md").read_text("utf-8")
    about = header(content)
    assert (about["library_name"], about["pipeline_tag"]) == ("setfit", "text-classification")
    assert not about.keys() & {"metrics", "model-index", "base_model"}
    assert loaded(content).eval_results is None
    assert not any(section.tables for section in read_markdown(content).values())


CARD_OF = {"teacher": 50, "student": 40}


@pytest.mark.parametrize(
    ("student", "base_model"),
    [
        ("org/name", "org/name"),
        ("sentence-transformers/paraphrase-MiniLM-L3-v2", "sentence-transformers/paraphrase-MiniLM-L3-v2"),
        ("0rg/1.0", "0rg/1.0"),
        ("org/name@v1", "org/name"),
        ("a/folder", None),
        ("/a/folder", None),
        ("deep/er/folder", None),
        ("a folder: #1/\"quoted\" 'é🙂'", None),
        ("layers:0,2,5", None),
        ("static:8", None),
        ("demo:all-MiniLM-L6-v2", None),
    ],
)
def test_a_card_names_the_hubs_model_that_its_student_was_and_no_folder(
    tmp_path: Path, student: str, base_model: str | None
) -> None:
    from_hub = [] if base_model is None else [student]
    folder = made_run(tmp_path / "run", CARD_OF, n=60, student=student, baseline=False, from_hub=from_hub)
    assert header(card(read_summary(folder), student)).get("base_model") == base_model


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
def test_a_cards_header_gives_back_any_name_of_the_evaluation_set(tmp_path: Path, name: str) -> None:
    folder = made_run(tmp_path / "run", CARD_OF, n=60, eval=name, baseline=False)
    content = card(read_summary(folder), "static:8")
    [result] = header(content)["model-index"][0]["results"]
    shown_as = PureWindowsPath(name).name
    assert (result["dataset"]["name"], result["dataset"]["type"]) == (shown_as, shown_as)
    assert {found.dataset_name for found in loaded(content).eval_results} == {shown_as}


@pytest.mark.parametrize(
    ("name", "from_hub", "shown_as"),
    [
        ("ag_news", ["datasets/ag_news"], "ag_news"),
        ("org/data@v1:config[test]", ["datasets/org/data@v1"], "org/data@v1:config[test]"),
        ("org/database", ["datasets/org/data"], "database"),
        ("bundled:newswire", [], "bundled:newswire"),
        ("secret/place/test.csv", [], "test.csv"),
        (r"C:\secret\place\test.csv", [], "test.csv"),
        ("~/place/test.csv", [], "test.csv"),
    ],
)
def test_a_card_names_data_of_the_hub_in_full_and_of_paths_the_last_part(
    tmp_path: Path, name: str, from_hub: list[str], shown_as: str
) -> None:
    folder = made_run(tmp_path / "run", CARD_OF, n=60, eval=name, baseline=False, from_hub=from_hub)
    [result] = header(card(read_summary(folder), "static:8"))["model-index"][0]["results"]
    assert result["dataset"]["name"] == shown_as


# The command


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["two", "unmeasured"])
def test_a_report_written_anew_is_the_one_that_the_run_wrote(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    before = tree(folder)
    cards = [path for path in folder.glob("student*/**/README.md") if "distilled by" in path.read_text("utf-8")]
    for path in (folder / PAGE, folder / MARKDOWN, *cards):
        path.unlink()
    result = report(folder)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [verdict(read_summary(folder)), f"The report is {folder / PAGE}."]
    assert tree(folder) == before
    assert len(cards) == (2 if name == "two" else 1)


def test_another_process_writes_the_same_report(two: Path) -> None:
    before = tree(two)
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "setfit_kd", "report", str(two)],
        capture_output=True, text=True, check=False, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert tree(two) == before


def test_a_run_that_is_gone_on_with_has_its_report_again(copied: Path) -> None:
    (copied / PAGE).unlink()
    distill(resume=copied, cache=False)
    assert read_page(copied).faults == []
    assert read_page(copied).title == "Distilled: run"


def without(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def halved(name: str) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def holding(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


NO_RUN = "There is no run in ", "Name the folder of a run."
DAMAGED = "run.json cannot be read", "Run anew."
OF_ANOTHER_KIND = ("run.json is not of a run that this version can tell of", "setfit-kd run --resume {}")
NOT_MEASURED = "holds no whole evaluation", "Evaluate again."
NO_TEXTS = "texts.jsonl cannot be read", "Evaluate the run again."


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        pytest.param(shutil.rmtree, *NO_RUN, id="gone"),
        pytest.param(without("run.json"), *NO_RUN, id="no account"),
        pytest.param(without("config.yaml"), *NO_RUN, id="no settings"),
        pytest.param(lambda folder: update_manifest(folder, finished=False), "has not come to its end",
                     "setfit-kd run --resume {}", id="unfinished"),
        pytest.param(halved("run.json"), *DAMAGED, id="half an account"),
        pytest.param(holding("run.json", b""), *DAMAGED, id="empty account"),
        pytest.param(holding("run.json", b"[1, 2]"), *OF_ANOTHER_KIND, id="account of another kind"),
        pytest.param(holding("run.json", b"\xff\xfe\0"), *DAMAGED, id="account that is no text"),
        pytest.param(
            lambda folder: update_manifest(folder, stages=None), *OF_ANOTHER_KIND, id="account without stages"
        ),
        pytest.param(holding("config.yaml", b"a: [b"), "is not valid YAML", "Write one",
                     id="settings that are no YAML"),
        pytest.param(holding("config.yaml", b"nonsense: 1"), "nonsense: is not a setting", "There are: ",
                     id="unknown setting"),
        *(
            pytest.param(change(f"evaluation/{name}"), *expected, id=f"{change.__name__} {name}")
            for change in (without, halved)
            for name, expected in {
                "teacher/measured.json": NOT_MEASURED,
                "students/static-8/probabilities.npy": NOT_MEASURED,
                "baselines/static-8/measured.json": NOT_MEASURED,
                "texts.jsonl": NO_TEXTS,
            }.items()
        ),
        pytest.param(holding("evaluation/teacher/probabilities.npy", b""), *NOT_MEASURED, id="empty probabilities"),
        pytest.param(holding("evaluation/texts.jsonl", b""), *NO_TEXTS, id="empty texts"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told_of_and_nothing_is_written(
    copied: Path, change: Change, message: str, hint: str
) -> None:
    change(copied)
    before = tree(copied)
    result = report(copied)
    assert result.exit_code == 2
    said, then = result.stderr.rstrip("\n").split("\n", maxsplit=1)
    assert said.startswith("Error: ")
    assert message in said
    assert str(copied) in said + then or "setting" in said
    assert hint.format(copied) in then
    assert tree(copied) == before


@pytest.mark.parametrize("blocked", [PAGE, MARKDOWN, "students/static-8/README.md"])
def test_what_cannot_be_written_is_told_of_and_nothing_is_half_written(copied: Path, blocked: str) -> None:
    before = tree(copied)
    (copied / blocked).unlink()
    (copied / blocked).mkdir()
    (copied / blocked / "mine").write_text("mine")
    result = report(copied)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: Cannot write {copied / blocked}: ")
    assert len(result.stderr.splitlines()) == 2
    after = tree(copied)
    assert set(after) == set(before) | {f"{blocked}/mine"}
    assert after[f"{blocked}/mine"] == b"mine"
    if blocked != PAGE:
        assert read_page(copied).faults == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_that_may_not_be_written_to_is_told_of(copied: Path) -> None:
    before = tree(copied)
    copied.chmod(0o555)
    try:
        result = report(copied)
    finally:
        copied.chmod(0o755)
    assert result.exit_code == 2
    assert "Permission is missing" in result.stderr
    assert tree(copied) == before


# In a browser


class Browser:
    """Debian's Chromium, spoken to by the WebDriver protocol."""

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
        # Whatever proxy the environment names, the driver is on this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        options = {"binary": chromium, "args": [*self.ARGUMENTS, f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        self._wait_for_driver()
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{session['sessionId']}"
        # The page that a new window shows asks for things of its own.
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
        """What has come since this was last asked."""
        found: list[dict[str, Any]] = self._call("POST", f"{self._session}/se/log", {"type": kind})
        return found

    def requested(self) -> set[str]:
        events = (json.loads(entry["message"])["message"] for entry in self.logged("performance"))
        return {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}

    def close(self) -> None:
        self._call("DELETE", self._session)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no chromium with its chromedriver here")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = subprocess.DEVNULL
    with subprocess.Popen([driver, f"--port={port}"], stdout=quiet, stderr=quiet) as process:
        try:
            opened = Browser(chromium, port, tmp_path_factory.mktemp("profile"))
            try:
                yield opened
            finally:
                opened.close()
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
COLOURS = """[...document.querySelectorAll('{}')].map(e => getComputedStyle(e).{})"""


def luminance(colour: str) -> float:
    """Relative luminance of a colour that a browser has computed, as WCAG defines it."""
    match = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour)
    assert match, colour
    parts = [int(part) / 255 for part in match.groups()]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", RUNS)
def test_the_page_fits_any_screen_and_asks_for_nothing(
    browser: Browser, name: str, width: int, dark: bool, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    browser.open(folder / PAGE, width=width, dark=dark)
    assert browser.logged("browser") == []
    assert {url for url in browser.requested() if not url.startswith("data:")} == {(folder / PAGE).as_uri()}
    assert browser.ask("document.title") == f"Distilled: {name}"
    assert browser.ask("document.querySelectorAll('script, img, iframe, object, embed, form, a').length") == 0
    assert browser.ask("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [width, True]
    boxes = browser.ask(BOXES.format("svg"))
    assert len(boxes) == (1 if name == "unmeasured" else 4)
    assert all(100 < side <= width for box in boxes for side in box)
    assert browser.ask("[...document.querySelectorAll('svg')].every(e => e.checkVisibility())")
    assert browser.ask(CUT_OFF) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_what_is_written_can_be_read_in_light_and_in_dark(browser: Browser, two: Path, dark: bool) -> None:
    browser.open(two / PAGE, dark=dark)
    [behind] = browser.ask(COLOURS.format("body", "backgroundColor"))
    assert luminance(behind) < 0.05 if dark else luminance(behind) > 0.8
    for where, what, least in (
        ("body", "color", 7),
        ("td, .verdict, pre", "color", 7),
        (".soft, thead th, figcaption", "color", 4.5),
        ("svg text", "fill", 7),
    ):
        colours = set(browser.ask(COLOURS.format(where, what)))
        assert colours
        assert min(contrast(colour, behind) for colour in colours) >= least, where
    lines = set(browser.ask(COLOURS.format("svg path", "stroke"))) - {"none"}
    assert max(contrast(colour, behind) for colour in lines) >= 3


def test_a_hostile_text_is_text_to_a_browser(browser: Browser, turned: Path) -> None:
    browser.open(turned / PAGE)
    found = browser.ask("[...document.querySelectorAll('.texts tbody td:first-child')].map(e => e.textContent)")
    expected = [shown_as or text for text, shown_as in HOSTILE.items()]
    assert sorted(found) == sorted(expected * 2)


def test_on_paper_everything_is_there(browser: Browser, two: Path) -> None:
    browser.open(two / PAGE, width=800, media="print")
    assert browser.ask("matchMedia('print').matches")
    shown_there = "h1, h2, h3, p, figure svg, figcaption, table:not(details *), pre:not(details *)"
    assert all(min(box) > 0 for box in browser.ask(BOXES.format(shown_there)))
    assert browser.ask(f"[...document.querySelectorAll('{shown_there}')].every(e => e.checkVisibility())")


def made(folder: Path, *students: str, right: int = 40, **settings: Any) -> Path:
    names = [
        called
        for name in student_paths(RunConfig.of(student=list(students))).values()
        for called in (baseline_path(name), name)
    ]
    return made_run(folder, {"teacher": 50, **dict.fromkeys(names, right)}, n=60, student=list(students), **settings)


def written(folder: Path) -> Path:
    result = report(folder)
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


def test_no_two_elements_of_the_page_share_an_id(two: Path) -> None:
    ids = Counter(attributes["id"] for _, attributes in read_page(two).elements if "id" in attributes)
    assert [name for name, n in ids.items() if n > 1] == []


def test_on_paper_settings_and_versions_are_shown_too(browser: Browser, two: Path) -> None:
    browser.open(two / PAGE, width=800, media="print")
    assert browser.ask("[...document.querySelectorAll('details > *')].every(e => e.checkVisibility())")


def test_legends_of_real_models_names_are_not_cut_off(browser: Browser, tmp_path: Path) -> None:
    names = (
        "sentence-transformers/paraphrase-MiniLM-L3-v2",
        "layers:0,2,5@sentence-transformers/paraphrase-mpnet-base-v2",
    )
    folder = written(made(tmp_path / "run", *names))
    browser.open(folder / PAGE)
    assert browser.ask(CUT_OFF) == []


def test_a_long_name_does_not_make_the_page_wider_than_the_screen(browser: Browser, tmp_path: Path) -> None:
    folder = written(made(tmp_path / ("n" * 80), "static:8"))
    browser.open(folder / PAGE, width=390)
    assert browser.ask("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [390, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_called_teacher_does_not_take_the_teachers_place(tmp_path: Path, kind: str) -> None:
    folder = written(made(tmp_path / "run", "models/teacher", "static:8"))
    rows = told_in(folder, kind)["Comparison", ""].tables[0][1:]
    assert len(rows) == 5
    assert rows[0][1] == "83.3%"  # 50 of 60; the students are right on 40


def test_a_student_whose_name_begins_with_an_underscore_is_in_the_legends(tmp_path: Path) -> None:
    folder = written(made(tmp_path / "run", "models/_mine", "static:8"))
    for drawing in read_page(folder).drawings[:3]:
        assert "_mine" in drawing["text"]


def test_names_in_other_scripts_give_no_warnings(tmp_path: Path) -> None:
    written(made(tmp_path / "run", "models/学生", "static:8"))


def test_many_students_can_be_drawn(tmp_path: Path) -> None:
    written(made(tmp_path / "run", *(f"org/a-student-{i}" for i in range(20))))


@pytest.mark.parametrize("student", ["./mine", "../mine", "models/mine"])
def test_a_folder_is_no_base_model(tmp_path: Path, student: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / student).mkdir(parents=True, exist_ok=True)
    folder = made_run(tmp_path / "run", CARD_OF, n=60, student=student, baseline=False)
    assert "base_model" not in header(card(read_summary(folder), student))


@pytest.mark.parametrize("name", ["a\x7fb.csv", "a\x9bb.csv", "a\ufffeb.csv"])
def test_a_cards_header_holds_odd_characters(tmp_path: Path, name: str) -> None:
    folder = made_run(tmp_path / "run", CARD_OF, n=60, eval=name, baseline=False)
    assert header(card(read_summary(folder), "static:8"))["model-index"][0]["results"][0]["dataset"]["name"] == name


def test_the_lines_to_use_a_student_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "my run", CARD_OF, n=60, baseline=False)
    [code] = read_markdown(markdown(read_summary(folder)))["How to use the student", ""].code
    predict, export, *_ = code.splitlines()
    assert shlex.split(predict)[2] == shlex.split(export)[2] == str(folder)


@pytest.mark.parametrize(
    "what",
    [{"evaluated": None}, {"versions": None}, {"data": None}, {"stages": []}, {"stages": {"teacher": {}}},
     {"students": []}, {"students": {"static:8": "students/gone"}}, {"versions": []},
     {"students": {"static:8": "students/../../other"}}, {"students": {"static:8": "/tmp"}},
     {"evaluated": ["teacher", "../../other"]}, {"seeds": ["../1"]}, {"seeds": [0, 1]}, {"seeds": [0]},
     {"precision": "fp32"},
     {"out_of_memory": [{}]}, {"data": []}],
    ids=str,
)  # fmt: skip
def test_an_account_that_is_not_whole_is_told_of_and_nothing_is_written(copied: Path, what: dict[str, Any]) -> None:
    about = {**read_json(copied / "run.json"), **what}
    (copied / "run.json").write_text(json.dumps({key: value for key, value in about.items() if value is not None}))
    before = tree(copied)
    result = report(copied)
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (2, True), repr(result.exception)
    assert tree(copied) == before


def test_texts_that_are_not_those_of_the_evaluations_are_told_of(copied: Path) -> None:
    path = copied / "evaluation" / "texts.jsonl"
    about, *rows = path.read_text("utf-8").splitlines(keepends=True)
    told = json.loads(about)
    path.write_text("".join([json.dumps({**told, "label_names": [*told["label_names"], "more"]}) + "\n", *rows]))
    assert isinstance(report(copied).exception, SystemExit)


def test_control_characters_of_labels_do_not_reach_the_page(tmp_path: Path) -> None:
    folder = written(
        made_run(tmp_path / "run", CARD_OF, n=60, labels=["a\0b", "c\u202ed", "L" * 20_000], baseline=False)
    )
    source = (folder / PAGE).read_text("utf-8")
    assert not re.search("[\0-\x08\x0b-\x1f\u202a-\u202e]", source)
    assert len(source) < 300_000


def test_a_card_names_its_teacher_however_many_classes_there_are(tmp_path: Path) -> None:
    labels = [f"a class called {i}" for i in range(60)]
    folder = made_run(tmp_path / "run", CARD_OF, n=60, labels=labels, baseline=False)
    assert "distilled by setfit-kd from org/teacher" in plain(card(read_summary(folder), "static:8"))


def test_markdown_tells_version_and_seed_however_many_students_there_are(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", *(f"sentence-transformers/some-long-name-of-a-model-{i}" for i in range(12)))
    assert read_markdown(markdown(read_summary(folder)))["", ""].paragraphs[1].endswith("seed 0.")


@pytest.mark.parametrize("setting", [("legend.fontsize", 30), ("xtick.labelsize", 30), ("savefig.bbox", "tight")])
def test_a_users_own_style_of_drawing_does_not_change_the_page(two: Path, setting: tuple[str, Any]) -> None:
    import matplotlib as mpl

    before = (two / PAGE).read_bytes()
    with mpl.rc_context(dict([setting])):
        changed = written(two)
    after = (changed / PAGE).read_bytes()
    written(two)
    assert after == before


def test_a_model_has_one_colour_in_all_drawings(two: Path) -> None:
    found: dict[str, set[str]] = {}
    entries = re.findall(r'<span style="background: (var\(--series-\d+\))"></span>([^<,]+)', read_page(two).source)
    assert entries
    for colour, name in entries:
        found.setdefault(name, set()).add(colour)
    assert {name: len(colours) for name, colours in found.items()} == dict.fromkeys(found, 1)


def test_a_student_of_no_measurable_size_is_told_of(tmp_path: Path) -> None:
    costs = {"teacher": (0.5, 100.0), "student": (0.0, 100.0)}
    written(made_run(tmp_path / "run", CARD_OF, n=60, cost=costs, baseline=False))


def test_no_option_is_named_that_the_command_does_not_have(copied: Path) -> None:
    (copied / PAGE).unlink()
    (copied / PAGE).mkdir()
    assert "--output-dir" not in report(copied).stderr


def test_the_page_tells_calibration_in_figures_as_markdown_does(two: Path) -> None:
    page, text = (told_in(two, kind)["Can the probabilities be believed?", ""].tables for kind in KINDS)
    assert page == text
