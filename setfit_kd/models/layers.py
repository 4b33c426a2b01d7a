"""Cut, convert and checkpoint transformer layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.errors import ModelError
from setfit_kd.models.bodies import family_of, load_local, model_errors
from setfit_kd.utils.console import quiet_libraries, truncate

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

logger = logging.getLogger(__name__)
_LAYER_PATHS = ("encoder.layer", "transformer.layer", "encoder.layers", "layers")  # in common encoders


def _find_layers(body: SentenceTransformer) -> tuple[nn.Module, str, nn.ModuleList]:
    """Find the list of layers: return the module that owns it, its attribute name there, and the list."""
    from torch import nn

    modules = dict(getattr(getattr(body[0], "auto_model", None), "base_model", nn.Module()).named_modules())
    for path in _LAYER_PATHS:
        owner, _, attribute = path.rpartition(".")
        layers = modules.get(path)
        if isinstance(layers, nn.ModuleList):
            return modules[owner], attribute, layers
    raise ModelError("Layers can only be cut out of a transformer encoder.", hint="Pass a model name as the student.")


@contextmanager
def checkpointed_layers(body: SentenceTransformer) -> Iterator[None]:
    """Context manager that recomputes the activations of transformer layers in the backward pass.

    Gradients and dropout masks stay the same (Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost"). The
    gradient checkpointing of transformers does not support all layer types, nor evaluation mode.
    """
    from torch.utils.checkpoint import checkpoint

    try:
        layers = list(_find_layers(body)[2])
    except ModelError:
        logger.warning("The body has no transformer layers to checkpoint: keeping all activations.")
        layers = []
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def n_layers(body: SentenceTransformer) -> int:
    """Return the number of transformer layers of a body."""
    return len(_find_layers(body)[2])


def cut_layers(body: SentenceTransformer, keep: Sequence[int]) -> SentenceTransformer:
    """Copy a body with only the transformer layers ``keep``, in this order; embeddings and pooling stay the same."""
    from torch import nn

    total = n_layers(body)
    if not keep or len(set(keep)) != len(keep) or not all(0 <= index < total for index in keep):
        message = f"Cannot keep layers {truncate(', '.join(map(str, keep)), 60)} of a body with {total} layers."
        raise ModelError(message, hint=f"Choose distinct layers from 0 to {total - 1}, for example layers:0,2,5.")
    small = copy.deepcopy(body)
    encoder: Any = small[0]
    config = encoder.auto_model.config
    if getattr(config, "layer_types", None):
        message = f"The layers of {config.model_type} differ in type and cannot be cut out."
        raise ModelError(message, hint="Pass a model name as the student.")
    owner, attribute, layers = _find_layers(small)
    setattr(owner, attribute, nn.ModuleList(layers[index] for index in keep))
    config.num_hidden_layers = len(keep)
    return small


_DISTILBERT_NAMES = {
    "bert.encoder.layer.": "distilbert.transformer.layer.",
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
    "bert.pooler.dense": "pre_classifier",
    "bert.embeddings": "distilbert.embeddings",
}
"""Parts of BERT's parameter names and their replacements for DistilBERT, in order."""


def to_distilbert(body: SentenceTransformer, layers: Sequence[int]) -> SentenceTransformer:
    """Create a DistilBERT from layers of a BERT, with its embeddings, its pooler's weights and its last layer.

    This is how DistilBERT was initialized (Sanh et al., 2019). DistilBERT has no token types: the vector of the first
    type, which all tokens of a single text have, is added to the position embeddings, so that the sum is the same.
    """
    from transformers.models.distilbert import DistilBertConfig, DistilBertForSequenceClassification

    from setfit_kd.models.transformer import body_from_model

    if family_of(body) != "transformer" or body[0].auto_model.config.model_type != "bert":  # type: ignore[union-attr]
        message = "Only layers of a BERT can be converted to a DistilBERT."
        raise ModelError(message, hint="Use layers without :distilbert to keep the model type.")
    small: Any = cut_layers(body, layers)[0]
    bert = small.model.config
    if bert.hidden_act not in ("gelu", "relu") or bert.is_decoder:
        settings = f"hidden_act={bert.hidden_act}, is_decoder={bert.is_decoder}"
        message = f"Expected an encoder with gelu or relu, got {settings}."
        raise ModelError(message, hint="Use layers without :distilbert.")
    same = ("vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id", "id2label", "label2id")
    layout = {"n_layers": bert.num_hidden_layers, "n_heads": bert.num_attention_heads, "activation": bert.hidden_act}
    sizes = {"dim": bert.hidden_size, "hidden_dim": bert.intermediate_size}
    rates = {"dropout": bert.hidden_dropout_prob, "attention_dropout": bert.attention_probs_dropout_prob}
    config = DistilBertConfig(**layout, **sizes, **rates, **{name: getattr(bert, name) for name in same})
    weights = {**small.model.state_dict(), **{f"classifier.{key}": v for key, v in small.head.state_dict().items()}}
    token_types = weights.pop("bert.embeddings.token_type_embeddings.weight")
    renamed = {}
    for name, value in weights.items():
        if name == "bert.embeddings.position_embeddings.weight":
            value = value + token_types[0]
        for old, new in _DISTILBERT_NAMES.items():
            name = name.replace(old, new)
        renamed[name] = value
    model = DistilBertForSequenceClassification(config)
    model.load_state_dict(renamed)
    return body_from_model(model, small.tokenizer, list(bert.id2label.values()))


def untrained_model(
    folder: Path, auto_model: Any, *, teacher: SentenceTransformer | None, seed: int = 0, **options: Any
) -> tuple[Any, Any]:
    """Create an untrained model from the config in a folder; return it with its tokenizer, or else the teacher's.

    ``auto_model`` is a class of transformers, such as ``AutoModelForSequenceClassification``.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"))
    tokenizer: Any = None if teacher is None else teacher.tokenizer
    if not has_tokenizer and not hasattr(tokenizer, "save_pretrained"):
        raise ModelError(f"Found no tokenizer in {folder}.", hint="Add a tokenizer to the folder.")
    with model_errors(folder), quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = load_local(AutoConfig.from_pretrained, folder, **options)
        if has_tokenizer:
            tokenizer = load_local(AutoTokenizer.from_pretrained, folder)
        if len(tokenizer) > config.vocab_size:
            owner = "its" if has_tokenizer else "the teacher's"
            expected = f"at least {len(tokenizer)}, the size of {owner} tokenizer"
            message = f"The vocab_size of the config in {folder} must be {expected}, got {config.vocab_size}."
            raise ModelError(message, hint="Add a matching tokenizer to the folder, or increase vocab_size.")
        return auto_model.from_config(config, trust_remote_code=False), tokenizer


def untrained_transformer(
    folder: Path, label_names: Sequence[str], *, teacher: SentenceTransformer | None, seed: int = 0
) -> SentenceTransformer:
    """Create an untrained transformer classifier or, without label names, an encoder; see `untrained_model`."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    from setfit_kd.models.transformer import body_from_model

    options: Any = {"teacher": teacher, "seed": seed, "num_labels": len(label_names) or 2}
    auto_model = AutoModelForSequenceClassification if label_names else AutoModel
    model, tokenizer = untrained_model(folder, auto_model, **options)
    with model_errors(folder):
        return body_from_model(model, tokenizer, label_names, seed=seed)
