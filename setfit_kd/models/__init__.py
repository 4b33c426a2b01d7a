"""Bodies, heads and whole SetFit models: finding, loading, running and saving them."""

from setfit_kd.models.bodies import checkpointed_layers, cut_layers, is_static, load_body, locate, n_layers, n_tokens
from setfit_kd.models.encode import embed, embed_tokens, head_proba, predict_proba
from setfit_kd.models.heads import fit_head, load_head, new_head, save_head, settled_c
from setfit_kd.models.identity import content_hash
from setfit_kd.models.store import (
    classifier_folder,
    load,
    load_folder,
    new_model,
    replace_head,
    save_model,
    with_head,
)
from setfit_kd.models.temperature import at_temperature, fit_temperature, held_out_logits, logits, tempered

__all__ = [
    "at_temperature",
    "checkpointed_layers",
    "classifier_folder",
    "content_hash",
    "cut_layers",
    "embed",
    "embed_tokens",
    "fit_head",
    "fit_temperature",
    "head_proba",
    "held_out_logits",
    "is_static",
    "load",
    "load_body",
    "load_folder",
    "load_head",
    "locate",
    "logits",
    "n_layers",
    "n_tokens",
    "new_head",
    "new_model",
    "predict_proba",
    "replace_head",
    "save_head",
    "save_model",
    "settled_c",
    "tempered",
    "with_head",
]
