"""Bodies, heads and whole SetFit models: finding, loading, running and saving them."""

from setfit_kd.models.bodies import checkpointed_layers, cut_layers, load_body, locate, n_layers
from setfit_kd.models.encode import embed, head_proba, predict_proba
from setfit_kd.models.heads import fit_head, new_head, settled_c
from setfit_kd.models.store import load, new_model, save_model

__all__ = [
    "checkpointed_layers",
    "cut_layers",
    "embed",
    "fit_head",
    "head_proba",
    "load",
    "load_body",
    "locate",
    "n_layers",
    "new_head",
    "new_model",
    "predict_proba",
    "save_model",
    "settled_c",
]
