"""Running a body over many texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from setfit_kd.memory import Attempt, OOMBackoff, move_model
from setfit_kd.models.bodies import vocabulary_size
from setfit_kd.runtime import in_windows, shorten
from setfit_kd.utils.arrays import iter_chunks, large_array
from setfit_kd.utils.console import track

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Batch = TypeVar("Batch", bound=Sized)
Result = TypeVar("Result")

_CHUNK = 256
"""Most texts handed over at once, or a batch if that is more; between two the progress bar moves."""


def run_batches(
    model: Any, batches: Iterable[Batch], run: Callable[[Batch, int], Result], total: int, size: int, description: str
) -> Iterator[Result]:
    """Call ``run`` on batches of ``total`` items and ``size``, the number of items that a forward pass may take.

    Where memory runs out, it goes on with a smaller size, and at last on the CPU; the model is moved back at the end.

    Raises:
        OutOfMemoryError: Not even one item at once fits.
    """
    home = model.device
    backoff = OOMBackoff(description, kind="encoding", device=home, size=size, model=model)
    done = 0

    def attempt(rung: Attempt) -> Result:
        model.to(rung.device)
        return run(batch, rung.size)

    with track(description, total) as advance:
        for batch in batches:
            backoff.step = done
            yield backoff.run(attempt)
            done += len(batch)
            advance(len(batch))
    if backoff.attempt.device != home:
        move_model(model, home, phase=description)


def shorten_texts(body: SentenceTransformer, texts: Sequence[str]) -> list[str]:
    """Texts cut to little more than a body reads of them, see `setfit_kd.runtime.shorten`."""
    body.preprocess(["a"])  # sets the truncation of its tokenizer
    tokenizer = getattr(body.tokenizer, "backend_tokenizer", body.tokenizer)
    return [shorten(text, tokenizer) for text in texts]


def embed(
    body: SentenceTransformer,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    normalize: bool = False,
    description: str = "Encoding",
) -> npt.NDArray[np.floating]:
    """Embed texts, longest first so that a batch holds texts of like length; order is kept.

    Where memory runs out, it goes on in smaller batches, and at last on the CPU.

    Args:
        body: The body, on the device it shall run on.
        texts: n texts.
        batch_size: Texts a forward pass.
        normalize: Scale every embedding to length 1.
        description: What to call the step on the progress bar.

    Returns:
        (n, d) float32; above `MAPPED_BYTES`, float16 mapped from a temporary file.

    Raises:
        OutOfMemoryError: Not even one text at once fits.
    """
    order = np.argsort([-len(text) for text in texts], kind="stable")
    embeddings: npt.NDArray[np.floating] | None = None
    windows = in_windows((texts[row] for row in order), max(_CHUNK, batch_size))
    batches = (shorten_texts(body, window) for window in windows)
    encode = partial(_encode, body, normalize)
    start = 0
    for part in run_batches(body, batches, encode, len(texts), size=batch_size, description=description):
        if embeddings is None:
            embeddings = large_array((len(texts), part.shape[1]))
        embeddings[order[start : start + len(part)]] = part
        start += len(part)
    return np.empty((0, body.get_embedding_dimension() or 0), np.float32) if embeddings is None else embeddings


def _encode(body: SentenceTransformer, normalize: bool, texts: list[str], size: int) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = body.encode(
        texts, batch_size=size, normalize_embeddings=normalize, show_progress_bar=False
    )
    return found


def embed_tokens(
    body: SentenceTransformer, *, batch_size: int = 1024, description: str = "Reading vocabulary"
) -> npt.NDArray[np.float32]:
    """Embed each token of a body's vocabulary as a text of its own: (n_tokens, d).

    Where memory runs out, it goes on in smaller batches, and at last on the CPU.

    Args:
        body: A transformer body with a fast tokenizer, on the device it shall run on.
        batch_size: Tokens a forward pass.
        description: What to call the step on the progress bar.

    Raises:
        OutOfMemoryError: Not even one token at once fits.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(body.tokenizer.backend_tokenizer.to_str())
    backend.no_padding()  # some pad every text to a fixed length
    alone = backend.encode("a")
    is_special = alone.special_tokens_mask
    first, last = is_special.index(0), len(is_special) - is_special[::-1].index(0)
    before, after = alone.ids[:first], alone.ids[last:]
    total = vocabulary_size(body)
    rows = np.tile(np.array([*before, 0, *after]), (total, 1))
    rows[:, len(before)] = np.arange(total)
    batches = (rows[start : start + batch_size] for start in range(0, total, batch_size))
    encode = partial(_encode_ids, body)
    parts = run_batches(body, batches, encode, total, size=batch_size, description=description)
    return np.concatenate(list(parts))


def _encode_ids(body: SentenceTransformer, rows: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.float32]:
    """Embed (B, T) token ids without padding: (B, d)."""
    import torch

    body.eval()
    parts = []
    with torch.inference_mode():
        for ids in torch.split(torch.as_tensor(rows).to(body.device), size):
            features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            parts.append(body(features)["sentence_embedding"].float().cpu().numpy())
    return np.concatenate(parts)


def predict_proba(
    model: SetFitModel, texts: Sequence[str], *, batch_size: int = 32, description: str = "Predicting"
) -> npt.NDArray[np.float32]:
    """Class probabilities of texts: (n, n_classes) float32, rows summing to 1."""
    embeddings = embed(
        model.model_body,
        texts,
        batch_size=batch_size,
        normalize=model.normalize_embeddings,
        description=description,
    )
    return head_proba(model, embeddings)


def head_proba(model: SetFitModel, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Class probabilities of (n, d) embeddings, as (n, n_classes) float32 summing to 1 in float64."""
    if not len(embeddings):
        return np.empty((0, len(model.labels or ())), np.float32)
    return np.concatenate([_head_proba(model, part) for part in iter_chunks(embeddings)])


def _head_proba(model: SetFitModel, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    import torch

    embeddings = np.asarray(embeddings, np.float32)
    if model.has_differentiable_head:
        with torch.no_grad():
            tensor = model.model_head.predict_proba(torch.as_tensor(embeddings, device=model.model_head.device))
        return np.asarray(tensor.cpu().numpy(), np.float32)
    return np.asarray(model.model_head.predict_proba(embeddings), np.float32)
