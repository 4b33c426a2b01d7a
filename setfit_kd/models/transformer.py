"""Sequence-classification transformers as bodies: what a text is to their last layer, and that layer as a head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import nn
from transformers import AutoConfig

from setfit_kd.errors import ModelError
from setfit_kd.models.bodies import CLASSIFIER_SUFFIX
from setfit_kd.models.safe_loading import check_finite, load_local, module_folders
from setfit_kd.utils.console import quiet_libraries, without_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TransformerFeatures(Transformer):
    """The features from which a sequence-classification transformer's last linear layer takes its logits.

    Alone in a sentence-transformers body, it makes a classifier trained end to end a body like any other: its
    ``sentence_embedding`` of B texts is (B, d), dropout before the last layer included, and ``head`` is that layer.

    Args:
        folder: A transformers model with its tokenizer.
        label_names: Names of the classes. A last layer that the folder has for exactly these, in any order, is kept.
        local: Options of every load, see `load_local`.

    Attributes:
        head: From (B, d) features to (B, n_classes) logits.
    """

    head: nn.Linear

    def __init__(self, folder: str, label_names: Sequence[str], **local: Any) -> None:
        before = AutoConfig.from_pretrained(folder, **local)
        is_classifier = any(name.endswith(CLASSIFIER_SUFFIX) for name in before.architectures or ())
        before_names = [str(before.id2label[index]) for index in sorted(before.id2label)]
        self._is_whole = is_classifier and sorted(before_names) == sorted(label_names)
        names = {
            "num_labels": len(label_names),
            "id2label": dict(enumerate(label_names)),
            "label2id": {name: index for index, name in enumerate(label_names)},
        }
        super().__init__(
            folder,
            transformer_task="sequence-classification",
            model_kwargs={**local, "ignore_mismatched_sizes": True, "dtype": torch.float32},
            processor_kwargs=dict(local),
            config_kwargs={**local, **names, "problem_type": "single_label_classification"},
        )
        self.module_output_name = "sentence_embedding"
        self._read_no_further_than_positions()
        found = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == len(label_names) and module.bias is not None
        ]
        if not found:
            raise ModelError(
                f"A {type(self.model).__name__} does not end in a linear layer with a bias, as encoders do.",
                hint="Take an encoder, such as a BERT or RoBERTa.",
            )
        self._place = found[-1]
        last = self.model.get_submodule(self._place)
        assert isinstance(last, nn.Linear)
        self.head = last
        self._put_last(nn.Identity())
        if self._is_whole:
            order = [before_names.index(name) for name in label_names]
            with torch.no_grad():
                self.head.weight.copy_(self.head.weight[order])
                self.head.bias.copy_(self.head.bias[order])
        else:
            nn.init.normal_(self.head.weight, std=getattr(before, "initializer_range", 0.02))
            nn.init.zeros_(self.head.bias)

    def _read_no_further_than_positions(self) -> None:
        """RoBERTa and MPNet count positions from the one after padding's, and have so many fewer for tokens."""
        for name, table in self.model.named_modules():
            if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
                assert isinstance(table, nn.Embedding)
                places = table.num_embeddings - (table.padding_idx or 0) - 1
                self.max_seq_length = min(self.max_seq_length or places, places)

    def _put_last(self, layer: nn.Module) -> None:
        owner, _, name = self._place.rpartition(".")
        setattr(self.model.get_submodule(owner), name, layer)

    def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        loaded: Any = super()._load_model(*args, **kwargs, output_loading_info=True)
        model: PreTrainedModel = loaded[0]
        told: dict[str, Any] = loaded[1]
        prefix = model.base_model_prefix + "."
        lacking = [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]
        missing = [key for key in sorted(lacking) if self._is_whole or (key.startswith(prefix) and "pooler" not in key)]
        if missing:
            raise ModelError(
                f"The model has no weights for {len(missing)} parts of a {type(model).__name__}, {missing[0]} among "
                "them.",
                hint="Give a transformers model whose weights are whole.",
            )
        return model

    def get_embedding_dimension(self) -> int:
        """The d of the features."""
        return self.head.in_features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write a folder that transformers' ``AutoModelForSequenceClassification`` reads."""
        self._put_last(self.head)
        try:
            self.model.save_pretrained(output_path)
        finally:
            self._put_last(nn.Identity())
        self.processor.save_pretrained(output_path)


def load_transformer(folder: Path, label_names: Sequence[str], *, seed: int = 0) -> SentenceTransformer:
    """Load a transformer to classify by, in single precision, on the CPU; code that comes with it is never run.

    Args:
        folder: A transformers or sentence-transformers model.
        label_names: Names of the classes.
        seed: Of what the folder has no weights for: the last layer, and in some models the one before it.

    Raises:
        ModelError: The folder does not load.
    """
    with quiet_libraries(), without_warnings("transformers"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # A sentence-transformers folder keeps its transformer in the folder of its first module.
        features = load_local(TransformerFeatures, folder / module_folders(folder)[0], label_names=label_names)
        body = SentenceTransformer(modules=[features], device="cpu").float().eval()
    check_finite(body, folder)
    return body


def from_parts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str], *, seed: int = 0
) -> SentenceTransformer:
    """The same from a model and a tokenizer in memory."""
    with TemporaryDirectory(prefix="setfit-kd-") as scratch:
        with quiet_libraries():
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        return load_transformer(Path(scratch), label_names, seed=seed)
