"""Malicious files and folders on the command line: no code runs, no hang, no full memory, no access outside."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import invoke as run_command
from checks import read_tree
from click.testing import Result
from conftest import FAST, newswire
from predictions import replace_file
from synthetic import raise_at_step

from setfit_kd import distill
from setfit_kd.export.bundle import export_bundle
from setfit_kd.export.publication import collect_files
from setfit_kd.models.io import load_folder
from setfit_kd.training.loss_trainer import Checkpoints

MAX_BYTES = 2_000_000_000

pytestmark = pytest.mark.timeout(60)  # far above the duration of each test; reading a pipe would never end


def peak_memory() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def invoke(*arguments: str | Path) -> Result:
    """Run a command and check that it ends without a traceback and within the memory limit."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_memory()
    # The texts to classify are also answers of consent.
    result = run_command(*arguments, stdin="y\n1\nyes\n" * 20)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    assert peak_memory() - before < MAX_BYTES
    return result


def assert_refused(*arguments: str | Path) -> str:
    """Run a command, check that it fails with a short error message, and return stderr."""
    result = invoke(*arguments)
    assert result.exit_code in (1, 2), result.output
    assert "Error: " in result.stderr
    assert len(result.stderr) < 10_000
    return result.stderr


@pytest.fixture(scope="module")
def finished(tiny_teacher: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished run, shared by the tests; do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    models = {"teacher": str(tiny_teacher), "student": str(tiny_student)}
    distill(*["bundled:newswire"] * 3, **{**FAST, **models, "pool_size": 40, "baseline": False, "output_dir": folder})
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def model(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "student", tmp_path / "model"))


@pytest.fixture(scope="module")
def shared_bundle(finished: Path) -> Path:
    folder = finished.with_name("bundle")
    texts = [row["text"] for row in newswire("train")[:20]]
    export_bundle(load_folder(finished / "student"), folder, texts=texts, format="onnx", min_agreement=0.9)
    return folder


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_bundle, tmp_path / "bundle"))


def change_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


# Code in model folders

SPY = "from pathlib import Path\nPath({path!r}).write_text('ran')\nfrom transformers import {name} as Spy\n"


def add_spies(folder: Path, evidence: Path) -> None:
    """Add Python files that record their execution, and refer to them in every configuration that can name code."""
    for file, name in (("spy_config", "BertConfig"), ("spy_model", "BertModel"), ("spy_tokenizer", "BertTokenizer")):
        (folder / f"{file}.py").write_text(SPY.format(path=str(evidence), name=name))
    models = ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForMaskedLM")
    names = {"AutoConfig": "spy_config.Spy", **dict.fromkeys(models, "spy_model.Spy")}
    tokenizer = {"AutoTokenizer": ["spy_tokenizer.Spy", "spy_tokenizer.Spy"], "AutoProcessor": "spy_tokenizer.Spy"}
    change_json(folder / "config.json", auto_map={**names, **tokenizer})
    change_json(folder / "tokenizer_config.json", auto_map=tokenizer)
    change_json(folder / "processor_config.json", auto_map=tokenizer, processor_class="Spy")


RUN = "run --preset newswire --device cpu --dry-run"
COMMANDS = {
    "teacher": f"{RUN} --teacher MODEL --student SAFE",
    "student": f"{RUN} --teacher SAFE --student MODEL",
    "transformer student": f"{RUN} --teacher SAFE --student transformer:MODEL",
    "layers": f"{RUN} --teacher SAFE --student layers:1@MODEL",
    "static": f"{RUN} --teacher SAFE --student static:8@MODEL",
    "blank": f"{RUN} --teacher SAFE --student blank:MODEL",
    "augment": f"{RUN} --teacher SAFE --student SAFE --augment 9 --augment-model MODEL",
    "finetune": "finetune MODEL --labeled few.jsonl --output-dir out --steps 1 --device cpu",
    "encoder": "encoder MODEL --nli nli.jsonl --output-dir out --epochs 1 --device cpu",
    "encoder teacher": "encoder SAFE --teacher MODEL --texts few.jsonl --output-dir out --epochs 1 --device cpu",
    "predict": "predict MODEL --device cpu",
    "evaluate": "evaluate MODEL --eval bundled:newswire --device cpu",
    "export": "export MODEL --output-dir out",
    "push": "push MODEL me/news --dry-run",
}


def arguments(command: str, model: Path, safe: Path) -> list[str]:
    """Return the arguments of a command with the model, and another one if needed."""
    return [part.replace("MODEL", str(model)).replace("SAFE", str(safe)) for part in COMMANDS[command].split()]


@pytest.mark.parametrize(
    "changes",
    [{}, {"config.json": {"model_type": "spy"}}, {"tokenizer_config.json": {"tokenizer_class": "Spy"}}],
    ids=["known types", "unknown model", "unknown tokenizer"],
)
@pytest.mark.parametrize(
    ("command", "is_classifier"),
    [*((command, False) for command in COMMANDS), *((command, True) for command in ("predict", "push", "finetune"))],
)
def test_code_in_model_folder_never_runs(
    command: str, is_classifier: bool, changes: dict[str, Any], model: Path, tiny_student: Path, tmp_path: Path
) -> None:
    if command not in ("predict", "evaluate", "export", "push"):  # these need a head
        shutil.rmtree(model)
        shutil.copytree(tiny_student, model)
    if is_classifier:  # a transformers folder
        (model / "modules.json").unlink()
        change_json(model / "config.json", architectures=["BertForSequenceClassification"])
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in newswire("train")[:40]))
    pairs = [{"premise": "a goal", "hypothesis": text, "label": "entailment"} for text in ("a match", "a team")]
    (tmp_path / "nli.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    add_spies(model, tmp_path / "evidence")
    for name, values in changes.items():
        change_json(model / name, **values)
    result = invoke(*arguments(command, model, tiny_student))
    assert not (tmp_path / "evidence").exists()
    assert result.exit_code == 0 or str(model) in result.stderr  # refused because of the model, not of the flags


@pytest.mark.parametrize(("command", "path"), [("predict", "../elsewhere"), ("teacher", "/elsewhere"), ("predict", 7)])
def test_modules_outside_the_folder_are_refused(command: str, path: Any, model: Path, tiny_student: Path) -> None:
    shutil.copytree(model, "elsewhere")
    modules = json.loads((model / "modules.json").read_text())
    modules[0]["path"] = str(Path("elsewhere").resolve()) if path == "/elsewhere" else path
    (model / "modules.json").write_text(json.dumps(modules))
    assert "modules.json points to" in assert_refused(*arguments(command, model, tiny_student))


# Symbolic links

LINKED = ("seeds", "evaluation/student", "checkpoints", ".student.0123abcd", "student/README.md", "run.json", ".lock")


@pytest.mark.parametrize("name", LINKED)
def test_links_in_run_folder_are_not_followed(name: str, run: Path, tmp_path: Path) -> None:
    outside, path = tmp_path / "outside", run / name
    (outside / "folder" / "7").mkdir(parents=True)
    (outside / "folder" / "README.md").write_text("mine")
    (outside / "folder" / ".new.0123abcd").mkdir()
    is_file = path.is_file() or name == ".lock"
    (outside / "file").write_bytes(path.read_bytes() if path.is_file() else b"")
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(outside / ("file" if is_file else "folder"))
    before = read_tree(outside)
    overwrite = f"run --preset newswire --device cpu --teacher x --output-dir {run} --overwrite"
    for command in (f"run --resume {run} --epochs 2", overwrite, f"report {run}"):
        assert_refused(*command.split())
        assert read_tree(outside) == before
    assert "is a symbolic link" in assert_refused("run", "--resume", run)


def test_links_to_run_folder_are_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(run)
    (run / "notes").symlink_to(tmp_path / "elsewhere")  # files that do not belong to the run are ignored
    assert invoke("report", tmp_path / "linked").exit_code == 0
    assert invoke("run", "--resume", tmp_path / "linked").exit_code == 0


def test_push_excludes_links_and_recreates_the_pickled_head(run: Path, tmp_path: Path) -> None:
    import joblib

    (tmp_path / "secret").write_text("secret")
    student = run / "student"
    for name in ("README.md", "vocab.txt"):
        (student / name).unlink(missing_ok=True)
        (student / name).symlink_to(tmp_path / "secret")
    os.mkfifo(student / "merges.txt")
    assert "merges.txt" in assert_refused("push", run, "me/news", "--dry-run")
    (student / "merges.txt").unlink()
    (student / "model_head.pkl").write_bytes(b"replaced")
    files, skipped = collect_files(run, "me/news")
    assert {"README.md", "vocab.txt"} <= set(skipped)
    assert "secret" not in str(files)
    pickled = files["model_head.pkl"]
    assert isinstance(pickled, bytes)
    head, expected = joblib.load(io.BytesIO(pickled)), load_folder(student).model_head
    assert np.array_equal(head.coef_, expected.coef_)


# Files that never end or do not fit in memory


def make_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 40_000_000_000)


BAD_FILES: dict[str, Callable[[Path], Any]] = {
    "sparse": make_sparse,
    "pipe": os.mkfifo,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
}
READ_FILES = [
    ("model", "predict model text --device cpu",
     ["config.json", "modules.json", "tokenizer.json", "tokenizer_config.json", "config_setfit.json", "head.json",
      "head.safetensors", "model.safetensors", "1_Pooling/config.json"]),
    ("bundle", "predict bundle text", ["manifest.json", "labels.json", "tokenizer.json", "model.onnx"]),
    ("run", "report run", ["run.json", "config.yaml", "evaluation/texts.jsonl", "evaluation/student/measured.json",
                           "evaluation/student/probabilities.npy"]),
    ("run", "export run --output-dir out", ["signals/texts.jsonl", "signals/signals.json", "signals/embeddings.npy"]),
    ("data", f"{RUN} --teacher SAFE --labeled data --unlabeled data",
     ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"]),
    ("settings", "run --config settings/settings.yaml", ["settings.yaml"]),
]  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize(("source", "command", "name"), [(*row, name) for *row, names in READ_FILES for name in names])
def test_files_must_be_regular(
    source: str, command: str, name: str, kind: str, request: pytest.FixtureRequest, tiny_student: Path, tmp_path: Path
) -> None:
    from datasets import Dataset

    if source == "data":
        Dataset.from_list(newswire("train")[:8]).save_to_disk("data")
        if name.endswith("arrow") and kind == "sparse":
            pytest.skip("Arrow files of any size are memory-mapped and read up to the first invalid record")
    elif source != "settings":
        request.getfixturevalue(source)
    (tmp_path / source).mkdir(exist_ok=True)
    (tmp_path / source / name).unlink(missing_ok=True)
    BAD_FILES[kind](tmp_path / source / name)
    assert_refused(*command.replace("SAFE", str(tiny_student)).split())


YAML_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_expanding_config_file_is_refused() -> None:
    numbers = [f"epochs: {value}" for value in ("[" * 20_000, "9" * 200_000, "1:" * 9**5)]
    for content in (YAML_BOMB, *numbers, "x" * 200_000 + ": 1"):
        Path("settings.yaml").write_text(content)
        assert_refused("run", "--config", "settings.yaml", "--device", "cpu")


GRAPH = """<ir_version: 8, opset_import: ["": 17]>
graph (int64[n, t] input_ids, int64[n, t] attention_mask) => (float[m, 4] probabilities)"""
LOOP = """
<int64 many = {4611686018427387904}, bool yes = {1}, float[1, 4] start = {0.25, 0.25, 0.25, 0.25}> {
  probabilities = LOOP <body = body (int64 round, bool go, float[1, 4] state) => (bool goes, float[1, 4] next) {
    goes = Identity (go)
    next = Identity (state)
  }> (many, yes, start)
}"""
RESHAPE = """
<int64[2] shape = {977, 4}> {
  flat = Reshape (input_ids, shape)
  probabilities = Cast <to = 1> (flat)
}"""


def test_endless_or_failing_graph_is_refused(bundle: Path) -> None:
    from onnx.parser import parse_model

    loops = {LOOP.replace("LOOP", name): "contains loops" for name in ("Loop", "Scan")}
    for nodes, message in {**loops, RESHAPE: "The bundle cannot be used"}.items():
        replace_file(bundle, "model.onnx", parse_model(GRAPH + nodes).SerializeToString())
        assert message in assert_refused("predict", bundle, "some text")


def test_panicking_tokenizer_is_an_error(bundle: Path, model: Path, tiny_student: Path) -> None:
    """The tokenizers library panics because a token of the post-processor is missing."""
    template = [{"SpecialToken": {"id": "[NONE]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": part, "type_id": 0}} for part in "AB"]
    post_processor = {"type": "TemplateProcessing", "single": template, "pair": pair, "special_tokens": {}}
    for folder in (model, bundle):
        change_json(folder / "tokenizer.json", post_processor=post_processor)
    replace_file(bundle, "tokenizer.json", (bundle / "tokenizer.json").read_bytes())
    assert "PanicException" in assert_refused("predict", bundle, "some text")
    assert "The tokenizer failed" in assert_refused(*arguments("predict", model, tiny_student))


def test_overlapping_tensors_are_refused(bundle: Path) -> None:
    """Five thousand tensors that share half a megabyte would take 10 GB in float32."""
    size = 1 << 19
    entry = {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}
    header = json.dumps({f"t{number}": entry for number in range(5000)}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(size)
    change_json(bundle / "manifest.json", kind="static")
    for name in ("embeddings.safetensors", "head.safetensors"):
        replace_file(bundle, name, content)
    assert "overlap" in assert_refused("predict", bundle, "some text")


def test_messages_are_bounded(run: Path, bundle: Path) -> None:
    replace_file(bundle, "labels.json", json.dumps(["x" * 3_000_000]).encode())
    assert_refused("predict", bundle, "some text")
    change_json(run / "student" / "config_setfit.json", labels=["x" * 3_000_000])
    assert_refused("predict", run, "some text", "--device", "cpu")
    stages = json.loads((run / "run.json").read_text())["stages"]
    change_json(run / "run.json", stages={**stages, "x" * 3_000_000: stages["student"]})
    assert_refused("run", "--resume", run)


def test_run_json_with_wrong_types_is_refused(run: Path) -> None:
    content = (run / "run.json").read_text()
    invalid: list[dict[str, Any]] = [{"stages": {"student": {"inputs": 7}}}, {"format": 9}, {"precision": {"name": []}}]
    for change in invalid:
        (run / "run.json").write_text(json.dumps({**json.loads(content), **change}))
        assert "run.json" in assert_refused("run", "--resume", run)


@pytest.mark.parametrize("name", ["head.safetensors", "model.safetensors"])
def test_weights_with_nan_are_refused(name: str, model: Path, tiny_student: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(model / name)
    next(iter(weights.values())).flat[0] = np.nan
    save_file(weights, model / name, metadata={"format": "pt"})
    for command in ("predict", "export", "push", *(["teacher"] if name.startswith("model") else [])):
        assert "not all finite" in assert_refused(*arguments(command, model, tiny_student))


class Spy:
    """Object that leaves evidence when it is unpickled."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> Any:
        return Path.write_text, (self.evidence, "ran")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_checkpoint_with_pickle_is_removed(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker file holds matching hashes, which an attacker can compute."""
    command = ("run", "--resume", run, "--epochs", "3", "--checkpoint-seconds", "1e-9")
    with monkeypatch.context() as patch:
        raise_at_step(patch, 2, KeyboardInterrupt)
        assert invoke(*command).exit_code == 130
    (checkpoint,) = (run / "checkpoints").glob("*/checkpoint-*")
    (checkpoint / name).write_bytes(pickle.dumps(Spy(tmp_path / "evidence")))
    change_json(checkpoint / "whole.json", **{name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()})
    assert "It was removed" in assert_refused(*command)
    assert not (tmp_path / "evidence").exists()
    assert invoke(*command).exit_code == 0


def test_checkpoint_that_names_a_device_is_removed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "whole.json").write_text(json.dumps({"/dev/zero": "0"}))
    assert Checkpoints(tmp_path, seconds=1).latest() is None
    assert not checkpoint.exists()
