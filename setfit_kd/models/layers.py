"""Cut, copy and checkpoint transformer layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.errors import ModelError
from setfit_kd.models.bodies import family_of
from setfit_kd.models.safe_loading import load_local, model_errors
from setfit_kd.models.transformer_head import transformer_module
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

logger = logging.getLogger(__name__)
# Where the common encoders keep their list of layers.
_LAYER_PATHS = ("encoder.layer", "transformer.layer", "encoder.layers", "layers")


def _layers(body: SentenceTransformer) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that owns the list of layers, the list's name in it, and the list."""
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
    raise ModelError("Layers can only be cut out of a transformer encoder.", hint="Name a model as the student.")


@contextmanager
def checkpointed_layers(body: SentenceTransformer) -> Iterator[None]:
    """Within this block, no transformer layer keeps its activations: they are computed again in the backward pass.

    Gradients are the same, dropout's draws included (Chen et al., 2016, "Training Deep Nets with Sublinear Memory
    Cost"). transformers' own checkpointing knows not every kind of layer, and none in evaluation mode. A body without
    transformer layers is left alone, with a warning.
    """
    from torch.utils.checkpoint import checkpoint

    try:
        layers = list(_layers(body)[2])
    except ModelError:
        logger.warning("This body has no transformer layers whose activations could be left out.")
        layers = []
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def n_layers(body: SentenceTransformer) -> int:
    """How many transformer layers a body has."""
    return len(_layers(body)[2])


def cut_layers(body: SentenceTransformer, keep: Sequence[int]) -> SentenceTransformer:
    """A copy of a body with only some of its transformer layers; embeddings, tokenizer and pooling are kept.

    Args:
        body: A transformer body with L layers.
        keep: Indices of the layers to keep, each from 0 to L - 1, in the order they shall have.

    Raises:
        ModelError: An index is out of range or stands twice, or the body has no such layers.
    """
    from torch import nn

    total = n_layers(body)
    if not keep or len(set(keep)) != len(keep) or not all(0 <= index < total for index in keep):
        raise ModelError(
            f"Cannot keep layers {', '.join(map(str, keep))} of a body with {total}.",
            hint=f"Name different layers from 0 to {total - 1}, as in layers:0,2,5.",
        )
    encoder: Any = body[0]
    if getattr(encoder.auto_model.config, "layer_types", None):
        raise ModelError(
            f"The layers of a {encoder.auto_model.config.model_type} differ in kind and cannot be cut out.",
            hint="Name a model as the student.",
        )
    small = copy.deepcopy(body)
    owner, attribute, layers = _layers(small)
    setattr(owner, attribute, nn.ModuleList(layers[index] for index in keep))
    encoder = small[0]
    encoder.auto_model.config.num_hidden_layers = len(keep)
    return small


_EMBEDDINGS, _LAYER = "bert.embeddings.", re.compile(r"bert\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_NAMES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
"""What the parts of BERT's layers are called in DistilBERT's."""


def to_distilbert(body: SentenceTransformer, layers: Sequence[int]) -> SentenceTransformer:
    """A DistilBERT of some of a BERT's layers, with its embeddings, its pooler's weights and its last layer.

    As DistilBERT was made of BERT (Sanh et al., 2019), which has no token types: the vector of the first type, which
    every token of a single text has, is added to that of its position, so that the sum is BERT's.

    Args:
        body: A transformer body that is a BERT.
        layers: Indices of the layers to keep.

    Raises:
        ModelError: It is another kind of model, or has no such layers.
    """
    from transformers.models.distilbert import DistilBertConfig, DistilBertForSequenceClassification

    from setfit_kd.models.transformer import from_parts

    if family_of(body) != "transformer" or transformer_module(body).model.config.model_type != "bert":
        raise ModelError(
            "Only a BERT's layers make a DistilBERT.", hint="Take layers without :distilbert, which keep the kind."
        )
    small = transformer_module(cut_layers(body, layers))
    bert: Any = small.model.config
    if bert.hidden_act not in ("gelu", "relu") or bert.is_decoder:
        raise ModelError(f"A DistilBERT has no {bert.hidden_act} layers.", hint="Take layers without :distilbert.")
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
    return from_parts(model, tokenizer, list(bert.id2label.values()))


def distilbert_weights(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """A sequence-classification BERT's weights under the names, and in the form, that a DistilBERT has them in."""
    found: dict[str, Tensor] = {}
    for name, value in bert.items():
        layer = _LAYER.fullmatch(name)
        if layer:
            number, part, kind = layer.groups()
            found[f"distilbert.transformer.layer.{number}.{_NAMES[part]}.{kind}"] = value
        elif name.startswith("bert.pooler.dense."):
            found[f"pre_classifier.{name.rpartition('.')[2]}"] = value
        elif name.startswith("classifier."):
            found[name] = value
        elif name == f"{_EMBEDDINGS}position_embeddings.weight":
            first_type = bert[f"{_EMBEDDINGS}token_type_embeddings.weight"][0]
            found["distilbert.embeddings.position_embeddings.weight"] = value + first_type
        elif name.startswith((f"{_EMBEDDINGS}word_embeddings.", f"{_EMBEDDINGS}LayerNorm.")):
            found["distilbert." + name.removeprefix("bert.")] = value
    return found


def untrained_transformer(
    folder: Path, label_names: Sequence[str], *, like: SentenceTransformer | None, seed: int = 0
) -> SentenceTransformer:
    """An untrained transformer as a config describes it.

    Args:
        folder: Where ``config.json`` lies and, by choice, a tokenizer.
        label_names: Names of the classes.
        like: A body whose tokenizer is taken where the folder has none.
        seed: Of the weights.

    Raises:
        ModelError: The config is none, or knows fewer tokens than the tokenizer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from setfit_kd.models.transformer import from_parts

    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"))
    if not has_tokenizer and (like is None or not hasattr(like.tokenizer, "save_pretrained")):
        raise ModelError(f"There is no tokenizer in {folder}.", hint="Put one beside the config.")
    with model_errors(folder), quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = load_local(AutoConfig.from_pretrained, folder, num_labels=len(label_names))
        tokenizer: PreTrainedTokenizerBase = (
            load_local(AutoTokenizer.from_pretrained, folder) if like is None or has_tokenizer else like.tokenizer
        )
        if len(tokenizer) > config.vocab_size:
            whose = "its" if has_tokenizer else "the teacher's"
            raise ModelError(
                f"The config in {folder} knows {config.vocab_size} tokens, {whose} tokenizer {len(tokenizer)}.",
                hint="Put a tokenizer beside the config, or raise its vocab_size.",
            )
        from_config: Any = AutoModelForSequenceClassification.from_config
        model = from_config(config, trust_remote_code=False)
        return from_parts(model, tokenizer, label_names, seed=seed)
