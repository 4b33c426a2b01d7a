"""Sequence-classification transformers as bodies, with the input of the last layer as the embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import set_temporary_class_attrs
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import nn
from transformers import AutoConfig

from setfit_kd.errors import ModelError
from setfit_kd.models.bodies import CLASSIFIER_SUFFIX, load_body, load_local, module_folders
from setfit_kd.runtime.classify import PAIR_SEPARATOR, split_pair
from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL, Task
from setfit_kd.utils.console import quiet_libraries, suppress_warnings

_PAIRS = "text_pairs"  # our entry in the config of a transformer


class TransformerFeatures(Transformer):
    """Module that outputs the features before the last linear layer of a sequence-classification transformer.

    As the only module of a body, it lets a transformer that is trained end to end be used like any other body: its
    ``sentence_embedding`` of B texts is (B, d), after any dropout before the last layer, and ``head`` is that layer.

    Args:
        folder: A transformers model with its tokenizer.
        label_names: Names of the classes. A saved last layer is kept if it has exactly these classes, in any order.
        local: Options for loading from `load_local`.
    """

    head: nn.Linear  # maps (B, d) features to (B, n_classes) logits

    def __init__(self, folder: str, label_names: Sequence[str], **local: Any) -> None:
        config = AutoConfig.from_pretrained(folder, **local)
        is_classifier = any(name.endswith(CLASSIFIER_SUFFIX) for name in config.architectures or ())
        saved_names = [str(config.id2label[index]) for index in sorted(config.id2label)]
        self._keeps_head = is_classifier and sorted(saved_names) == sorted(label_names)
        label2id = {name: index for index, name in enumerate(label_names)}
        is_multi_label = self._keeps_head and config.problem_type == MULTI_LABEL.problem_type
        problem_type = (MULTI_LABEL if is_multi_label else SINGLE_LABEL).problem_type
        classes = {"num_labels": len(label_names), "id2label": dict(enumerate(label_names)), "label2id": label2id}
        super().__init__(
            folder,
            transformer_task="sequence-classification",
            model_kwargs={**local, "ignore_mismatched_sizes": True, "dtype": torch.float32},
            processor_kwargs=dict(local),
            config_kwargs={**local, **classes, "problem_type": problem_type},
        )
        self.module_output_name = "sentence_embedding"
        limit_positions(self)
        linear = ((path, layer) for path, layer in self.model.named_modules() if isinstance(layer, nn.Linear))
        last = [pair for pair in linear if pair[1].out_features == len(label_names) and pair[1].bias is not None][-1:]
        if not last:
            message = f"The last layer of {type(self.model).__name__} must be linear with a bias."
            raise ModelError(message, hint="Use an encoder such as BERT or RoBERTa.")
        self._head_path, self.head = last[0]
        self._set_last_layer(nn.Identity())
        if self._keeps_head:
            order = [saved_names.index(name) for name in label_names]
            with torch.no_grad():
                self.head.weight.copy_(self.head.weight[order])
                self.head.bias.copy_(self.head.bias[order])
        else:
            nn.init.normal_(self.head.weight, std=getattr(config, "initializer_range", 0.02))
            nn.init.zeros_(self.head.bias)

    @property
    def task(self) -> Task:
        """The task of the classifier, which is saved in its config."""
        return MULTI_LABEL if self.model.config.problem_type == MULTI_LABEL.problem_type else SINGLE_LABEL

    @task.setter
    def task(self, task: Task) -> None:
        self.model.config.problem_type = task.problem_type  # type: ignore[assignment]

    @property
    def takes_pairs(self) -> bool:
        """Whether pairs of texts are classified, which is saved in the config of the model."""
        return bool(getattr(self.model.config, _PAIRS, False))

    @takes_pairs.setter
    def takes_pairs(self, value: bool) -> None:
        if value != self.takes_pairs:
            setattr(self.model.config, _PAIRS, value)

    def preprocess(self, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Tokenize texts; those that `join_pair` has joined are passed to the tokenizer as pairs."""
        items = [split_pair(text) if isinstance(text, str) and PAIR_SEPARATOR in text else text for text in inputs]
        return super().preprocess(items, *args, **kwargs)

    def _set_last_layer(self, layer: nn.Module) -> None:
        owner, _, name = self._head_path.rpartition(".")
        setattr(self.model.get_submodule(owner), name, layer)

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        loaded: Any = super()._load_model(*args, **kwargs, output_loading_info=True)
        model, info = loaded
        prefix = model.base_model_prefix + "."
        keys = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
        missing = [key for key in keys if self._keeps_head or (key.startswith(prefix) and "pooler" not in key)]
        check_complete(model, missing)
        return model

    def get_embedding_dimension(self) -> int:
        """Return the dimension d of the features."""
        return self.head.in_features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save in the format of transformers' ``AutoModelForSequenceClassification``."""
        self._set_last_layer(self.head)
        try:
            self.model.save_pretrained(output_path)
        finally:
            self._set_last_layer(nn.Identity())
        self.processor.save_pretrained(output_path)


def check_complete(model: Any, missing: Sequence[str]) -> None:
    """Raise a `ModelError` if weights of a transformers model are missing."""
    if missing:
        message = f"The model lacks {len(missing)} weights of {type(model).__name__}, including {missing[0]}."
        raise ModelError(message, hint="Use a transformers model with complete weights.")


def limit_positions(module: Transformer) -> None:
    """Limit the maximum length of a transformer to the positions that it has embeddings for."""
    for name, table in module.model.named_modules():
        padding = getattr(table, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding) and padding is not None:
            # In models such as RoBERTa and MPNet, positions start after the padding index.
            n_positions = table.num_embeddings - padding - 1
            module.max_seq_length = min(module.max_seq_length or n_positions, n_positions)


def load_encoder(folder: Path) -> SentenceTransformer:
    """Load an encoder in a folder of sentence-transformers or transformers; only the weights of a pooler may lack."""
    load_model: Any = Transformer._load_model

    def load_and_check(self: Transformer, *args: Any, **kwargs: Any) -> Any:
        model, info = load_model(self, *args, **kwargs, output_loading_info=True)
        check_complete(model, sorted(key for key in info["missing_keys"] if "pooler" not in key))
        return model

    with suppress_warnings("transformers"), set_temporary_class_attrs(Transformer, _load_model=load_and_check):
        return cast("SentenceTransformer", load_local(SentenceTransformer, folder, device="cpu"))


def load_transformer(folder: Path, label_names: Sequence[str], *, seed: int = 0) -> SentenceTransformer:
    """Load a transformer classifier, see `BodySource.load`; it may be in a sentence-transformers folder."""
    with suppress_warnings("transformers"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # In a sentence-transformers folder, the transformer is in the folder of the first module.
        features = load_local(TransformerFeatures, folder / module_folders(folder)[0], label_names=label_names)
        return SentenceTransformer(modules=[features], device="cpu").float().eval()


def body_from_model(model: Any, tokenizer: Any, label_names: Sequence[str], *, seed: int = 0) -> SentenceTransformer:
    """Convert a model and a tokenizer in memory to a body, see `load_transformer`; an encoder without label names."""
    load = partial(load_transformer, label_names=label_names, seed=seed) if label_names else load_body
    return save_and_load(model, tokenizer, load)


def save_and_load(model: Any, tokenizer: Any, load: Callable[[Path], SentenceTransformer]) -> SentenceTransformer:
    """Convert a model and a tokenizer in memory to the body that ``load`` reads from their folder."""
    with TemporaryDirectory(prefix="setfit-kd-") as folder, quiet_libraries(with_setfit=False):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load(Path(folder))
