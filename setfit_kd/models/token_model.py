"""Transformers with an output for each token as bodies: for question answering and masked language modeling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoModelForQuestionAnswering
from transformers.modeling_outputs import BaseModelOutput

from setfit_kd.errors import ModelError
from setfit_kd.models.bodies import check_finite, load_local, model_errors, module_folders
from setfit_kd.models.layers import untrained_model
from setfit_kd.models.transformer import check_complete, limit_positions, save_and_load
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.console import quiet_libraries, suppress_warnings, truncate

TokenTask: TypeAlias = Literal["question-answering", "fill-mask"]
_AUTO_MODELS: dict[TokenTask, Any] = {
    "question-answering": AutoModelForQuestionAnswering,
    "fill-mask": AutoModelForMaskedLM,
}
_N_COMPARED = 1000  # texts whose tokens are compared
_INPUTS = ("input_ids", "attention_mask")


class TokenModel(Transformer):
    """Module that outputs one vector per token of a transformer whose head maps these vectors to logits.

    As the only module of a body, it lets such a transformer be trained like any other body. The head is separate, so
    that it can be applied to some of the tokens only.

    Args:
        folder: A transformers model with its tokenizer.
        task: What the head is for.
        local: Options for loading from `load_local`.
    """

    has_head: bool  # whether the loaded weights include the head; otherwise, it is untrained
    uses_token_types: bool  # whether the model distinguishes the tokens of two texts by their types

    def __init__(self, folder: str, task: TokenTask, **local: Any) -> None:
        self.task = task
        super().__init__(
            folder,
            model_kwargs={**local, "dtype": torch.float32},
            processor_kwargs=dict(local),
            config_kwargs=dict(local),
            modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            module_output_name="token_embeddings",
        )
        limit_positions(self)
        accepts_types = "token_type_ids" in signature(self.model.base_model.forward).parameters
        has_types = getattr(self.model.config, "type_vocab_size", 0) > 1
        self.uses_token_types = (
            accepts_types and has_types and "token_type_ids" in getattr(self.tokenizer, "model_input_names", ())
        )

    def _load_model(self, *args: Any, **options: Any) -> Any:
        folder, _, config, *_ = args
        auto_model = _AUTO_MODELS[self.task]
        model, info = auto_model.from_pretrained(folder, config=config, output_loading_info=True, **options)
        prefix = f"{model.base_model_prefix}."
        missing = sorted(key for key in info["missing_keys"] if key.startswith(prefix) and "pooler" not in key)
        check_complete(model, missing)
        self.has_head = all(key.startswith(prefix) for key in info["missing_keys"])
        return model

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add ``token_embeddings`` (B, T, d), and those of the first tokens as ``sentence_embedding`` (B, d)."""
        names = (*_INPUTS, *["token_type_ids"] * self.uses_token_types)
        inputs = {name: features[name] for name in names if name in features}
        hidden = self.model.base_model(**inputs).last_hidden_state
        return {**features, "token_embeddings": hidden, "sentence_embedding": hidden[:, 0]}

    def apply_head(self, hidden: Tensor) -> Any:
        """Apply the head to vectors (B, T, d); return the output of the transformers model, with its logits."""
        with _replaced_base(self.model, hidden):
            return self.model(inputs_embeds=hidden, return_dict=True)

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Save the transformers model with its tokenizer."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)


class _Constant(nn.Module):
    """Base model that returns fixed vectors."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.hidden)


@contextmanager
def _replaced_base(model: Any, hidden: Tensor) -> Iterator[None]:
    """Context manager in which the base model returns ``hidden``, so that only the head is computed."""
    name, base = model.base_model_prefix, model.base_model
    setattr(model, name, _Constant(hidden))
    try:
        yield
    finally:
        setattr(model, name, base)


def load_token_model(folder: Path, task: TokenTask, *, seed: int = 0) -> SentenceTransformer:
    """Load a transformer with a head for a task, in fp32 on the CPU; ``seed`` is for the weights of a missing head.

    The transformer may be in a sentence-transformers folder. Raises a `ModelError` if it cannot be loaded.
    """
    quiet = quiet_libraries(with_setfit=False)
    with model_errors(folder), quiet, suppress_warnings("transformers"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = load_local(TokenModel, folder / module_folders(folder)[0], task=task)
        body = SentenceTransformer(modules=[module], device="cpu").float().eval()
        check_finite(body, folder)
        return body


def save_token_model(body: SentenceTransformer, folder: Path) -> None:
    """Save a body from `load_token_model` atomically, as a transformers model with its tokenizer."""
    module: Any = body[0]
    with atomic_folder(folder) as part, quiet_libraries(with_setfit=False):
        module.save(str(part))


def untrained_token_model(
    folder: Path, task: TokenTask, *, teacher: SentenceTransformer | None, seed: int = 0
) -> SentenceTransformer:
    """Create an untrained transformer with a head for a task, see `untrained_model`."""
    model, tokenizer = untrained_model(folder, _AUTO_MODELS[task], teacher=teacher, seed=seed)
    return save_and_load(model, tokenizer, partial(load_token_model, task=task))


def check_same_tokens(teacher: SentenceTransformer, student: SentenceTransformer, texts: Sequence[str]) -> None:
    """Raise a `ModelError` if two bodies do not tokenize the first texts alike, with the first text that differs."""
    sample, tokenizers = list(texts[:_N_COMPARED]), (teacher.tokenizer, student.tokenizer)
    ids = [tokenizer(sample, truncation=False, verbose=False)["input_ids"] for tokenizer in tokenizers]
    for text, *rows in zip(sample, *ids, strict=True):
        if rows[0] != rows[1]:
            tokens = [tokenizer.convert_ids_to_tokens(row) for tokenizer, row in zip(tokenizers, rows, strict=True)]
            shown = [truncate(" ".join(map(str, row)), 120) for row in (rows if tokens[0] == tokens[1] else tokens)]
            difference = f"the teacher's tokens are {shown[0]}, the student's {shown[1]}"
            message = f"Teacher and student tokenize {truncate(text, 60)!r} differently: {difference}."
            raise ModelError(message, hint="Use a student with the vocabulary of the teacher, such as layers:0,2,4.")
