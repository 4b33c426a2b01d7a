"""Bodies, heads and whole SetFit models: finding, loading, running and saving them."""

from setfit_kd.models.bodies import (
    TRANSFORMER,
    BodySource,
    checkpointed_layers,
    cut_layers,
    default_prompt,
    family_of,
    is_static,
    load_body,
    loading,
    locate,
    locate_body,
    n_layers,
    n_tokens,
    transformer_classes,
)
from setfit_kd.models.copying import as_distilbert, blank_transformer
from setfit_kd.models.encode import embed, embed_tokens, head_proba, predict_proba, shortened
from setfit_kd.models.fill_mask import load_fill_mask
from setfit_kd.models.heads import fit_head, load_head, new_head, save_head, settled_c, softmax_weights
from setfit_kd.models.identity import content_hash
from setfit_kd.models.local_files import check_finite, load_local, module_folders
from setfit_kd.models.own_heads import last_layer, own_head, put_head
from setfit_kd.models.store import (
    classifier_folder,
    load,
    load_folder,
    new_model,
    replace_head,
    save_model,
    with_head,
)
from setfit_kd.models.temperature import held_out_logits, logits, tempered

__all__ = [
    "TRANSFORMER",
    "BodySource",
    "as_distilbert",
    "blank_transformer",
    "check_finite",
    "checkpointed_layers",
    "classifier_folder",
    "content_hash",
    "cut_layers",
    "default_prompt",
    "embed",
    "embed_tokens",
    "family_of",
    "fit_head",
    "head_proba",
    "held_out_logits",
    "is_static",
    "last_layer",
    "load",
    "load_body",
    "load_fill_mask",
    "load_folder",
    "load_head",
    "load_local",
    "loading",
    "locate",
    "locate_body",
    "logits",
    "module_folders",
    "n_layers",
    "n_tokens",
    "new_head",
    "new_model",
    "own_head",
    "predict_proba",
    "put_head",
    "replace_head",
    "save_head",
    "save_model",
    "settled_c",
    "shortened",
    "softmax_weights",
    "tempered",
    "transformer_classes",
    "with_head",
]
