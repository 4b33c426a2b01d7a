"""Cut, convert and checkpoint transformer layers."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.errors import ModelError
from setfit_kd.models.bodies import family_of
from setfit_kd.models.safe_loading import load_local, model_errors
from setfit_kd.models.transformer_head import transformer_module
from setfit_kd.utils.console import quiet_libraries
from setfit_kd.utils.escape import truncate

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
# Attribute paths of the list of layers in common encoders.
_LAYER_PATHS = ("encoder.layer", "transformer.layer", "encoder.layers", "layers")


def _find_layers(body: SentenceTransformer) -> tuple[nn.Module, str, nn.ModuleList]:
    """Find the list of layers: return the module that owns it, its attribute name there, and the list."""
    from torch import nn

    model = getattr(getattr(body[0], "auto_model", None), "base_model", None)
    for path in _LAYER_PATHS:
        owner, _, attribute = path.rpartition(".")
        try:
            parent = model.get_submodule(owner) if model is not None else None
        except AttributeError:
            continue
        layers = getattr(parent, attribute, None)
        if isinstance(parent, nn.Module) and isinstance(layers, nn.ModuleList):
            return parent, attribute, layers
    raise ModelError("Layers can only be cut out of a transformer encoder.", hint="Pass a model name as the student.")


@contextmanager
def checkpointed_layers(body: SentenceTransformer) -> Iterator[None]:
    """Context manager that recomputes the activations of transformer layers in the backward pass.

    Gradients and dropout masks stay the same (Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost"). The
    gradient checkpointing of transformers does not support all layer types, nor evaluation mode. A body without
    transformer layers is left unchanged, with a warning.
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
    """Copy a body with only some of its transformer layers; embeddings, tokenizer and pooling are kept.

    Args:
        body: A transformer body with L layers.
        keep: Indices of the layers to keep, from 0 to L - 1, in their new order.

    Raises:
        ModelError: If an index is out of range or occurs twice, or the body has no layers that can be cut out.
    """
    from torch import nn

    total = n_layers(body)
    if not keep or len(set(keep)) != len(keep) or not all(0 <= index < total for index in keep):
        raise ModelError(
            f"Cannot keep layers {truncate(', '.join(map(str, keep)), 60)} of a body with {total} layers.",
            hint=f"Choose distinct layers from 0 to {total - 1}, for example layers:0,2,5.",
        )
    encoder: Any = body[0]
    if getattr(encoder.auto_model.config, "layer_types", None):
        raise ModelError(
            f"The layers of {encoder.auto_model.config.model_type} differ in type and cannot be cut out.",
            hint="Pass a model name as the student.",
        )
    small = copy.deepcopy(body)
    owner, attribute, layers = _find_layers(small)
    setattr(owner, attribute, nn.ModuleList(layers[index] for index in keep))
    encoder = small[0]
    encoder.auto_model.config.num_hidden_layers = len(keep)
    return small


_BERT_EMBEDDINGS, _BERT_LAYER = "bert.embeddings.", re.compile(r"bert\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_DISTILBERT_NAMES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
"""Maps the parameter names in a BERT layer to those in a DistilBERT layer."""


def to_distilbert(body: SentenceTransformer, layers: Sequence[int]) -> SentenceTransformer:
    """Create a DistilBERT from layers of a BERT, with its embeddings, its pooler's weights and its last layer.

    This is how DistilBERT was initialized (Sanh et al., 2019). DistilBERT has no token types: the vector of the first
    type, which all tokens of a single text have, is added to the position embeddings, so that the sum is the same.

    Args:
        body: A transformer body that is a BERT.
        layers: Indices of the layers to keep.

    Raises:
        ModelError: If the body is not a BERT or does not have these layers.
    """
    from transformers.models.distilbert import DistilBertConfig, DistilBertForSequenceClassification

    from setfit_kd.models.transformer import body_from_model

    if family_of(body) != "transformer" or transformer_module(body).model.config.model_type != "bert":
        raise ModelError(
            "Only layers of a BERT can be converted to a DistilBERT.",
            hint="Use layers without :distilbert to keep the model type.",
        )
    small = transformer_module(cut_layers(body, layers))
    bert: Any = small.model.config
    if bert.hidden_act not in ("gelu", "relu") or bert.is_decoder:
        raise ModelError(
            f"Expected an encoder with gelu or relu, got hidden_act={bert.hidden_act}, is_decoder={bert.is_decoder}.",
            hint="Use layers without :distilbert.",
        )
    config = DistilBertConfig(
        vocab_size=bert.vocab_size,
        max_position_embeddings=bert.max_position_embeddings,
        n_layers=bert.num_hidden_layers,
        n_heads=bert.num_attention_heads,
        dim=bert.hidden_size,
        hidden_dim=bert.intermediate_size,
        dropout=bert.hidden_dropout_prob,
        attention_dropout=bert.attention_probs_dropout_prob,
        activation=bert.hidden_act,
        initializer_range=bert.initializer_range,
        pad_token_id=bert.pad_token_id,
        id2label=bert.id2label,
        label2id=bert.label2id,
    )
    model = DistilBertForSequenceClassification(config)
    weights = {**small.model.state_dict(), **{f"classifier.{key}": v for key, v in small.head.state_dict().items()}}
    model.load_state_dict(distilbert_weights(weights))
    tokenizer = small.tokenizer
    assert tokenizer is not None
    return body_from_model(model, tokenizer, list(bert.id2label.values()))


def distilbert_weights(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of a sequence-classification BERT to those of a DistilBERT."""
    converted: dict[str, Tensor] = {}
    for name, value in bert.items():
        layer = _BERT_LAYER.fullmatch(name)
        if layer:
            number, part, kind = layer.groups()
            converted[f"distilbert.transformer.layer.{number}.{_DISTILBERT_NAMES[part]}.{kind}"] = value
        elif name.startswith("bert.pooler.dense."):
            converted[f"pre_classifier.{name.rpartition('.')[2]}"] = value
        elif name.startswith("classifier."):
            converted[name] = value
        elif name == f"{_BERT_EMBEDDINGS}position_embeddings.weight":
            first_type = bert[f"{_BERT_EMBEDDINGS}token_type_embeddings.weight"][0]
            converted["distilbert.embeddings.position_embeddings.weight"] = value + first_type
        elif name.startswith((f"{_BERT_EMBEDDINGS}word_embeddings.", f"{_BERT_EMBEDDINGS}LayerNorm.")):
            converted["distilbert." + name.removeprefix("bert.")] = value
    return converted


def untrained_transformer(
    folder: Path, label_names: Sequence[str], *, teacher: SentenceTransformer | None, seed: int = 0
) -> SentenceTransformer:
    """Create an untrained transformer from its config.

    Args:
        folder: Folder with ``config.json`` and, optionally, a tokenizer.
        label_names: Names of the classes.
        teacher: Body whose tokenizer is used if the folder has none.
        seed: Seed of the weights.

    Raises:
        ModelError: If the config cannot be loaded, there is no tokenizer, or the vocabulary of the config is smaller
            than that of the tokenizer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from setfit_kd.models.transformer import body_from_model

    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"))
    if not has_tokenizer and (teacher is None or not hasattr(teacher.tokenizer, "save_pretrained")):
        raise ModelError(f"Found no tokenizer in {folder}.", hint="Add a tokenizer to the folder.")
    with model_errors(folder), quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = load_local(AutoConfig.from_pretrained, folder, num_labels=len(label_names))
        tokenizer: PreTrainedTokenizerBase = (
            load_local(AutoTokenizer.from_pretrained, folder) if teacher is None or has_tokenizer else teacher.tokenizer
        )
        if len(tokenizer) > config.vocab_size:
            owner = "its" if has_tokenizer else "the teacher's"
            raise ModelError(
                f"The vocab_size of the config in {folder} must be at least {len(tokenizer)}, the size of {owner} "
                f"tokenizer, got {config.vocab_size}.",
                hint="Add a matching tokenizer to the folder, or increase vocab_size.",
            )
        from_config: Any = AutoModelForSequenceClassification.from_config
        model = from_config(config, trust_remote_code=False)
        return body_from_model(model, tokenizer, label_names, seed=seed)
