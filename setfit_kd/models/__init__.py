"""Bodies, heads and whole SetFit models: finding, loading, running and saving them."""

from setfit_kd.models.bodies import (
    TRANSFORMER,
    BodySource,
    default_prompt,
    family_of,
    is_static,
    load_body,
    locate,
    locate_body,
    transformer_classes,
)
from setfit_kd.models.encode import embed, embed_tokens, head_proba, predict_proba, run_batches, shortened
from setfit_kd.models.fingerprint import content_hash
from setfit_kd.models.heads import fit_head, load_head, new_head, save_head, settled_c, softmax_weights
from setfit_kd.models.io import classifier_folder, load, load_folder, new_model, replace_head, save_model, with_head
from setfit_kd.models.layers import as_distilbert, blank_transformer, checkpointed_layers, cut_layers, n_layers
from setfit_kd.models.safe_loading import check_finite, load_local, loading, module_folders
from setfit_kd.models.static import DEFAULT_DIMENSION, check_teacher, static_body
from setfit_kd.models.temperature import (
    at_temperature,
    fit_temperature,
    held_out_logits,
    log_probabilities,
    logits,
    tempered,
)
from setfit_kd.models.transformer_head import last_layer, own_head, put_head

__all__ = [
    "DEFAULT_DIMENSION",
    "TRANSFORMER",
    "BodySource",
    "as_distilbert",
    "at_temperature",
    "blank_transformer",
    "check_finite",
    "check_teacher",
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
    "head_proba",
    "held_out_logits",
    "is_static",
    "last_layer",
    "load",
    "load_body",
    "load_folder",
    "load_head",
    "load_local",
    "loading",
    "locate",
    "locate_body",
    "log_probabilities",
    "logits",
    "module_folders",
    "n_layers",
    "new_head",
    "new_model",
    "own_head",
    "predict_proba",
    "put_head",
    "replace_head",
    "run_batches",
    "save_head",
    "save_model",
    "settled_c",
    "shortened",
    "softmax_weights",
    "static_body",
    "tempered",
    "transformer_classes",
    "with_head",
]
