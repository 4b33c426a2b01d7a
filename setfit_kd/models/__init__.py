"""Bodies, heads and SetFit models: locate, load, run and save them."""

from setfit_kd.models.bodies import (
    TRANSFORMER_PREFIX,
    BodySource,
    default_prompt,
    family_of,
    is_static,
    load_body,
    locate_body,
    locate_model,
    transformer_label_names,
)
from setfit_kd.models.encode import embed, embed_tokens, head_proba, predict_proba, run_batches, shorten_texts
from setfit_kd.models.fingerprint import content_hash
from setfit_kd.models.heads import fit_head, load_head, new_head, resolve_c, save_head, softmax_weights
from setfit_kd.models.io import (
    classifier_folder,
    load,
    load_folder,
    new_model,
    replace_head,
    save_model,
    with_saved_head,
)
from setfit_kd.models.layers import checkpointed_layers, cut_layers, n_layers, to_distilbert, untrained_transformer
from setfit_kd.models.safe_loading import check_finite, load_local, model_errors, module_folders
from setfit_kd.models.static import DEFAULT_DIMENSION, check_static_teacher, static_body
from setfit_kd.models.temperature import (
    at_temperature,
    fit_temperature,
    head_at_temperature,
    head_logits,
    held_out_logits,
    log_probabilities,
)
from setfit_kd.models.transformer_head import get_head, last_layer, set_head

__all__ = [
    "DEFAULT_DIMENSION",
    "TRANSFORMER_PREFIX",
    "BodySource",
    "at_temperature",
    "check_finite",
    "check_static_teacher",
    "checkpointed_layers",
    "classifier_folder",
    "content_hash",
    "cut_layers",
    "default_prompt",
    "embed",
    "embed_tokens",
    "family_of",
    "fit_head",
    "fit_temperature",
    "get_head",
    "head_at_temperature",
    "head_logits",
    "head_proba",
    "held_out_logits",
    "is_static",
    "last_layer",
    "load",
    "load_body",
    "load_folder",
    "load_head",
    "load_local",
    "locate_body",
    "locate_model",
    "log_probabilities",
    "model_errors",
    "module_folders",
    "n_layers",
    "new_head",
    "new_model",
    "predict_proba",
    "replace_head",
    "resolve_c",
    "run_batches",
    "save_head",
    "save_model",
    "set_head",
    "shorten_texts",
    "softmax_weights",
    "static_body",
    "to_distilbert",
    "transformer_label_names",
    "untrained_transformer",
    "with_saved_head",
]
