"""Bodies, heads and whole SetFit models: finding, loading, running and saving them."""

from setfit_kd.models.bodies import checkpointed_layers, cut_layers, is_static, load_body, locate, n_layers, n_tokens
from setfit_kd.models.encode import embed, embed_tokens, head_proba, predict_proba
from setfit_kd.models.heads import fit_head, new_head, settled_c
from setfit_kd.models.store import classifier_folder, load, new_model, save_model

__all__ = [
    "checkpointed_layers",
    "classifier_folder",
    "cut_layers",
    "embed",
    "embed_tokens",
    "fit_head",
    "head_proba",
    "is_static",
    "load",
    "load_body",
    "locate",
    "n_layers",
    "n_tokens",
    "new_head",
    "new_model",
    "predict_proba",
    "save_model",
    "settled_c",
]
