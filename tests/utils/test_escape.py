"""Escaping of untrusted texts and names on terminals, in logs and in Markdown."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checks import assert_refused, invoke
from synthetic import QUICK, few_labels, pool_signals

from setfit_kd import train_student
from setfit_kd.export.bundle import export_bundle
from setfit_kd.models.bodies import load_body
from setfit_kd.models.io import save_model
from setfit_kd.models.static import static_body
from setfit_kd.run_folder.log import record_log
from setfit_kd.utils.console import json_text, printable

LINK = "](http://x) <img src=x> \n# heading"
LABELS = ("\x1b]0;x\x07title", "\x1b[2J\x9b31m", "\u202egnp\r\x7f\u2028\u2066x", LINK)
HOSTILE = "\x1b]0;x\x07\x1b[2J\x9b\u202e\r\x7f"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
RUN = "run --labeled labeled.jsonl --student layers:1 --shots 2 --eval eval.jsonl --device cpu --dry-run --teacher"


@pytest.fixture(scope="module")
def folder(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a static student with hostile class names as a model, which has a hostile file, and as a bundle."""
    folder = tmp_path_factory.mktemp("hostile")
    signals, labeled = replace(pool_signals(), label_names=LABELS), replace(few_labels(), label_names=LABELS)
    body = static_body(load_body(tiny_teacher), signals.texts, dimension=8)
    model = train_student(signals, body, labeled=labeled, **QUICK)
    save_model(model, folder / "model", title=LINK)
    save_model(model, folder / "long", title="t" * 5_000)
    (folder / "model" / f"left out {HOSTILE}").touch()
    export_bundle(model, folder / "bundle", texts=signals.texts, title=LINK)
    return folder


COMMANDS = [
    "predict BUNDLE text HOSTILE",
    "predict BUNDLE -i HOSTILE.txt",
    "evaluate MODEL --eval eval.jsonl --device cpu --json",
    "benchmark BUNDLE --unlabeled ./HOSTILE.csv",
    f"{RUN} ./nowhereHOSTILE",
    f"{RUN} TEACHER --text-column HOSTILE",
    "run --config HOSTILE.txt",
    "export MODEL --unlabeled eval.jsonl --output-dir HOSTILE",
    "push MODEL me/tiny --dry-run",
    "report a bHOSTILE",
    "HOSTILE",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_writes_control_characters(command: str, folder: Path, tiny_teacher: Path) -> None:
    texts = pool_signals().texts
    rows = [{"text": f"{text} {HOSTILE}", "label": LABELS[row % 4]} for row, text in enumerate(texts[:8])]
    for name in ("labeled.jsonl", "eval.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path(f"{HOSTILE}.txt").write_text(f"a text\n\n{HOSTILE}: [\n", encoding="utf-8", newline="")
    Path(HOSTILE).mkdir()
    names = {"MODEL": folder / "model", "BUNDLE": folder / "bundle", "TEACHER": tiny_teacher}
    result = invoke(*(names.get(part, part.replace("HOSTILE", HOSTILE)) for part in command.split()))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    for content in (result.stdout_bytes, result.stderr_bytes):
        assert CONTROL.findall(content.decode("utf-8")) == []
    assert re.search(r"\\(x1b|u001b|x9b|u009b)", result.output)


def test_standalone_runtime_writes_no_control_characters(folder: Path, tmp_path: Path) -> None:
    program = [sys.executable, str(folder / "bundle" / "classify.py")]
    succeeded = subprocess.run([*program, HOSTILE], capture_output=True, check=True)
    assert CONTROL.findall(succeeded.stdout.decode("utf-8")) == []
    assert json.loads(succeeded.stdout)["text"] == HOSTILE
    record = json.loads(invoke("predict", folder / "bundle", HOSTILE).stdout)
    assert (record["text"], tuple(record["probabilities"])) == (HOSTILE, LABELS)
    failed = subprocess.run([*program, "--bundle", tmp_path / HOSTILE, "a"], capture_output=True, check=False)
    assert failed.returncode == 1
    assert CONTROL.findall(failed.stderr.decode("utf-8")) == []
    assert rb"\u001b]0;" in failed.stderr


def test_run_log_has_no_control_characters(tmp_path: Path) -> None:
    with record_log() as log:
        log.open(tmp_path / "run.log")
        logging.getLogger("setfit_kd").warning("Of %s", HOSTILE)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logging.getLogger("setfit_kd").exception("It failed.")
    content = (tmp_path / "run.log").read_bytes().decode("utf-8")
    assert CONTROL.findall(content) == []
    assert r"Of \x1b]0;x\x07" in content
    assert "\n" + r"ValueError: \x1b]0;" in content


@pytest.mark.parametrize("kind", ["model", "bundle"])
def test_readme_escapes_markdown_and_truncates_names(kind: str, folder: Path) -> None:
    content = (folder / kind / "README.md").read_text(encoding="utf-8")
    escaped = r"\](http://x) \<img src=x\> \# heading"
    assert f"# {escaped}\n" in content
    assert rf" 4 classes: \]0;x title, \[2J 31m, gnp x, {escaped}." + "\n" in content
    assert CONTROL.findall(content) == []
    assert f"# {'t' * 599}…\n" in (folder / "long" / "README.md").read_text(encoding="utf-8")


def test_control_characters_are_escaped() -> None:
    assert printable("plain, مرحبا 👩\u200d👧 é\n") == "plain, مرحبا 👩\u200d👧 é\n"
    escaped = r"\x1b[2J\r\t\x00\x7f\x85\x9b\u202e\u2066\u2028\u200f\ud83d"
    assert printable(escaped.encode("ascii").decode("unicode_escape")) == escaped
    assert printable("a\nb", keep="") == r"a\nb"


def test_middle_of_long_message_is_left_out(folder: Path) -> None:
    text = "a" * 1_000 + "\x1b" * 3_000 + "z" * 1_000
    assert printable(text) == "a" * 1_000 + "… (3,000 characters left out) …" + "z" * 1_000
    assert printable("b" * 2_000) == "b" * 2_000
    Path("eval.csv").write_text(f"{'y' * 9_000},label\na,b\n", encoding="utf-8")
    result = invoke("evaluate", folder / "model", "--eval", "eval.csv", "--device", "cpu")
    assert_refused(result, "characters left out")
    assert len(result.stderr) < 2_500


def test_json_text_is_always_valid() -> None:
    text = json_text({"\x9b": [float("nan"), float("-inf"), "\u2028\ud83d"], "b": {1}, "c": 1e300}, indent=1)
    assert CONTROL.findall(text) == []
    text.encode("utf-8")
    expected = {"\x9b": [None, None, "\u2028\ud83d"], "b": "{1}", "c": 1e300}
    assert json.loads(text, parse_constant=pytest.fail) == expected
