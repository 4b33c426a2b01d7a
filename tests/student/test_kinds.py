"""Kinds of student bodies, static embeddings, and several students in one run."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from conftest import FAST, make_body, newswire
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from synthetic import QUICK, equal_weights, few_labels, pool_signals, weights

from setfit_kd import RunConfig, RunResult, distill, evaluate, load, train_student, train_teacher
from setfit_kd.cli import main
from setfit_kd.config.presets import read_config
from setfit_kd.errors import ConfigError, ModelError, SetFitKDError
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.models.bodies import is_static, load_body
from setfit_kd.models.encode import embed, embed_tokens, predict_proba
from setfit_kd.models.static import static_body
from setfit_kd.run import student_stages, teacher_stages
from setfit_kd.student.kinds import build_student_body, folder_names, locate_student, spread_evenly

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel
    from tokenizers import Tokenizer

Floats = npt.NDArray[np.floating]
WIDTH = 32
"""Embedding size of the tiny teacher."""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# Layers and static embeddings by name


@pytest.fixture(scope="session")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_body(tmp_path_factory.mktemp("models") / "six", layers=6, width=16, seed=2)


@pytest.fixture(scope="session")
def static_folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "static-folder"
    static_body(load_body(tiny_teacher), [], dimension=8).save_pretrained(str(folder), create_model_card=False)
    return folder


def query_weights(body: SentenceTransformer) -> list[torch.Tensor]:
    """Return the query weights of each layer, which identify the layer."""
    encoder: Any = body[0]
    return [layer.attention.self.query.weight.detach() for layer in encoder.auto_model.encoder.layer]


def layer_indices(body: SentenceTransformer, original: SentenceTransformer) -> tuple[int, ...]:
    """Return the indices that a body's layers have in the original body."""
    originals = query_weights(original)
    return tuple(
        next(i for i, weight in enumerate(originals) if torch.equal(weight, query)) for query in query_weights(body)
    )


def token_embeddings(body: SentenceTransformer) -> Floats:
    """Return the (n_tokens, d) embeddings of a static body."""
    static: Any = body[0]
    embeddings: Floats = static.embedding.weight.detach().numpy()
    return embeddings


def get_tokenizer(body: SentenceTransformer) -> Tokenizer:
    transformer: Any = body
    tokenizer: Tokenizer = transformer.tokenizer.backend_tokenizer
    return tokenizer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers:0,2,5", (0, 2, 5)),
        ("layers:5,0", (5, 0)),
        ("layers:3", (0, 2, 5)),
        ("layers:1", (0,)),
        ("layers:6", (0, 1, 2, 3, 4, 5)),
    ],
)
def test_layers_are_copied_from_teacher(name: str, expected: tuple[int, ...], six_layers: Path) -> None:
    teacher = load_body(six_layers)
    student = build_student_body(locate_student(name), teacher=teacher)
    assert layer_indices(student, teacher) == expected
    assert len(query_weights(teacher)) == 6  # the teacher is unchanged


@pytest.mark.parametrize(("name", "expected"), [("layers:2", (0, 5)), ("layers:4,1", (4, 1))])
def test_layers_are_copied_from_another_model(
    name: str, expected: tuple[int, ...], six_layers: Path, teacher_body: SentenceTransformer
) -> None:
    student = build_student_body(locate_student(f"{name}@{six_layers}"), teacher=teacher_body)
    assert layer_indices(student, load_body(six_layers)) == expected


@pytest.mark.parametrize(
    ("number", "total", "expected"),
    [
        (3, 6, (0, 2, 5)),
        (6, 12, (0, 2, 4, 7, 9, 11)),
        (4, 12, (0, 4, 7, 11)),
        (2, 6, (0, 5)),
        (1, 6, (0,)),
    ],
)
def test_number_of_layers_is_spread_evenly(number: int, total: int, expected: tuple[int, ...]) -> None:
    assert spread_evenly(number, total) == expected


@given(st.integers(1, 200).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total))))
def test_spread_layers_include_first_and_last(sizes: tuple[int, int]) -> None:
    number, total = sizes
    layers = spread_evenly(number, total)
    assert len(layers) == number
    assert layers[0] == 0
    assert layers[-1] == total - 1 or number == 1
    gaps = np.diff(layers)
    assert (gaps > 0).all()
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


TEXTS = ["the match was lost", "shares rose in the morning", "the vote"]


@pytest.mark.parametrize("dimension", [2, 8, WIDTH])
def test_static_student_has_token_embeddings_of_teacher(dimension: int, teacher_body: SentenceTransformer) -> None:
    student = build_student_body(locate_student(f"static:{dimension}"), teacher=teacher_body, texts=TEXTS)
    assert is_static(student)
    np.testing.assert_array_equal(
        token_embeddings(student), token_embeddings(static_body(teacher_body, TEXTS, dimension=dimension))
    )


def test_static_student_uses_fine_tuned_teacher(tiny_teacher: Path, teacher_body: SentenceTransformer) -> None:
    prepared = locate_student("static:8").prepare(teacher_body)
    tuned = load_body(tiny_teacher)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.01)
    student = prepared.build(tuned, TEXTS, tuned.device)
    np.testing.assert_array_equal(token_embeddings(student), token_embeddings(static_body(tuned, TEXTS, dimension=8)))
    assert not np.array_equal(
        token_embeddings(student), token_embeddings(static_body(teacher_body, TEXTS, dimension=8))
    )


def test_static_student_has_token_embeddings_of_another_model(
    tiny_student: Path, teacher_body: SentenceTransformer
) -> None:
    student = build_student_body(locate_student(f"static:8@{tiny_student}"), teacher=teacher_body, texts=TEXTS)
    expected = static_body(load_body(tiny_student), TEXTS, dimension=8)
    np.testing.assert_array_equal(token_embeddings(student), token_embeddings(expected))


def test_static_student_has_128_dimensions_by_default(tmp_path: Path) -> None:
    wide = load_body(make_body(tmp_path / "wide", layers=1, width=144))
    student = build_student_body(locate_student("static"), teacher=wide)
    assert student.get_embedding_dimension() == 128


@pytest.mark.parametrize("name", ["static-mini", "statics", "static:8", "layers-3", "layers:2", "layers:x"])
def test_folder_takes_precedence_over_kind_with_same_name(
    name: str, tiny_student: Path, teacher_body: SentenceTransformer
) -> None:
    Path(name).symlink_to(tiny_student)
    student = build_student_body(locate_student(name), teacher=teacher_body)
    assert equal_weights(list(student.state_dict().values()), list(load_body(tiny_student).state_dict().values()))


INVALID: list[tuple[str, type[SetFitKDError], str]] = [
    ("layers", ConfigError, "number of layers, got 'layers:'"),
    ("layers:", ConfigError, "number of layers, got 'layers:'"),
    ("layers:x", ConfigError, "number of layers, got 'layers:x'"),
    ("layers:1,", ConfigError, "number of layers, got 'layers:1,'"),
    ("layers:-1", ConfigError, "number of layers, got 'layers:-1'"),
    ("layers:1.5", ConfigError, "number of layers, got 'layers:1.5'"),
    ("layers:x@STUDENT", ConfigError, "number of layers, got 'layers:x'"),
    ("layers:x@nobody/has-this", ConfigError, "number of layers, got 'layers:x'"),  # before anything is downloaded
    ("layers:5", ModelError, "of a body with 4"),
    ("layers:0,4", ModelError, "of a body with 4"),
    ("layers:1,1", ModelError, "of a body with 4"),
    ("layers:3@STUDENT", ModelError, "of a body with 2"),
    ("layers:2@STATIC", ModelError, "transformer"),
    ("layers:2@./nowhere", ModelError, "No such model folder: ./nowhere"),
    ("static:0", ConfigError, "number of dimensions, at least 2, got 'static:0'"),
    ("static:1", ConfigError, "number of dimensions, at least 2, got 'static:1'"),
    ("static:x", ConfigError, "number of dimensions, at least 2, got 'static:x'"),
    ("static:8.5", ConfigError, "number of dimensions, at least 2, got 'static:8.5'"),
    ("static:8,4", ConfigError, "number of dimensions, at least 2, got 'static:8,4'"),
    ("static:1@nobody/has-this", ConfigError, "number of dimensions, at least 2, got 'static:1'"),
    ("static", ModelError, "at most 32 dimensions, as the teacher has, got 128"),
    ("static:33", ModelError, "at most 32 dimensions, as the teacher has, got 33"),
    ("static:17@STUDENT", ModelError, "at most 16 dimensions, as the teacher has, got 17"),
    ("static:8@STATIC", ModelError, "transformer"),
    ("static:8@./nowhere", ModelError, "No such model folder: ./nowhere"),
]


@pytest.mark.parametrize(("name", "error", "fragment"), INVALID)
def test_invalid_name_raises_error_before_training(
    name: str,
    error: type[SetFitKDError],
    fragment: str,
    tiny_teacher: Path,
    tiny_student: Path,
    static_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher_stages, "train_teacher", lambda *_, **__: pytest.fail("training has started"))
    name = name.replace("STUDENT", str(tiny_student)).replace("STATIC", str(static_folder))
    students = [str(tiny_student), name]
    with pytest.raises(error, match=re.escape(fragment)) as raised:
        small_run(tiny_teacher, students, output_dir=tmp_path / "run")
    assert raised.value.hint
    assert not (tmp_path / "run").exists()


def test_student_cannot_be_built_from_static_teacher(static_folder: Path) -> None:
    for name in ("static:8", "layers:1"):
        with pytest.raises(ModelError, match="transformer") as raised:
            locate_student(name).prepare(load_body(static_folder))
        assert raised.value.hint


# Token embeddings


CLS, SEP = 2, 3


@pytest.mark.parametrize(("before", "after"), [((CLS,), (SEP,)), ((), ()), ((SEP,), ())])
def test_token_embedding_is_embedding_of_single_token(
    before: tuple[int, ...], after: tuple[int, ...], student_body: SentenceTransformer
) -> None:
    from tokenizers import processors

    tokenizer = get_tokenizer(student_body)
    template = " ".join(["[SEP]" if token == SEP else "[CLS]" for token in before] + ["$A"] + ["[SEP]"] * len(after))
    specials = [("[CLS]", CLS), ("[SEP]", SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    embeddings = embed_tokens(student_body)
    assert embeddings.dtype == np.float32
    assert len(embeddings) == tokenizer.get_vocab_size()
    encoder: Any = student_body[0]
    for token in range(0, len(embeddings), 20):
        ids = torch.tensor([[*before, token, *after]])
        with torch.inference_mode():
            hidden = encoder.auto_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        np.testing.assert_allclose(embeddings[token], hidden[0].mean(dim=0), atol=1e-5)
    assert np.ptp(embeddings, axis=0).min() > 0.01  # not all equal


@pytest.mark.parametrize("batch_size", [64, 999, 100_000])
def test_token_embeddings_do_not_depend_on_batch_size(student_body: SentenceTransformer, batch_size: int) -> None:
    expected = embed_tokens(student_body)
    np.testing.assert_allclose(embed_tokens(student_body, batch_size=batch_size), expected, atol=1e-6)


def test_token_embeddings_do_not_depend_on_padding(student_body: SentenceTransformer) -> None:
    expected = embed_tokens(student_body)
    get_tokenizer(student_body).enable_padding(length=16)
    np.testing.assert_allclose(embed_tokens(student_body), expected, atol=1e-6)
    assert get_tokenizer(student_body).padding is not None  # the tokenizer is unchanged


def test_token_batches_shrink_when_memory_runs_out(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    expected = embed_tokens(student_body)
    forward, batch_sizes = SentenceTransformer.forward, list[int]()

    def limited(body: Any, features: dict[str, Any], **kwargs: Any) -> Any:
        batch_size = len(features["input_ids"])
        if batch_size > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        batch_sizes.append(batch_size)
        return forward(body, features, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "forward", limited)
    with shared_backoff() as events:
        embeddings = embed_tokens(student_body, batch_size=1024)
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)
    assert sum(batch_sizes) == len(expected)
    assert events[-1].after.batch_size == 128
    assert {event.phase for event in events} == {"Reading vocabulary"}


# Static bodies


def single_token_words(body: SentenceTransformer) -> dict[str, int]:
    """Return the words that are a single token, with their token."""
    tokenizer = get_tokenizer(body)
    return {
        word: token
        for word, token in tokenizer.get_vocab().items()
        if word.isalpha() and tokenizer.encode(word, add_special_tokens=False).ids == [token]
    }


def test_embedding_of_single_token_text_is_token_embedding(teacher_body: SentenceTransformer) -> None:
    body = static_body(teacher_body, [], dimension=WIDTH)
    words = single_token_words(teacher_body)
    assert len(words) > 500
    embeddings = body.encode(list(words), show_progress_bar=False)
    np.testing.assert_allclose(embeddings, embed_tokens(teacher_body)[list(words.values())], atol=1e-6)


def test_embedding_of_text_is_mean_of_token_embeddings(teacher_body: SentenceTransformer) -> None:
    body = static_body(teacher_body, TEXTS, dimension=8)
    texts = [row["text"] for row in newswire("eval")[:50]]
    encoded = get_tokenizer(teacher_body).encode_batch(texts, add_special_tokens=False)
    expected = np.stack([token_embeddings(body)[text.ids].mean(axis=0) for text in encoded])
    np.testing.assert_allclose(body.encode(texts, show_progress_bar=False), expected, atol=1e-6)


def test_long_text_is_not_truncated(teacher_body: SentenceTransformer) -> None:
    body = static_body(teacher_body, [], dimension=WIDTH)
    (first_word, first), (second_word, second) = list(single_token_words(teacher_body).items())[:2]
    text = f"{f'{first_word} ' * 100}{f'{second_word} ' * 300}"
    embedding = body.encode(text, show_progress_bar=False)
    np.testing.assert_allclose(
        embedding, (token_embeddings(body)[first] + 3 * token_embeddings(body)[second]) / 4, atol=1e-5
    )


def test_frequent_tokens_have_smaller_weights(teacher_body: SentenceTransformer) -> None:
    words = single_token_words(teacher_body)
    (frequent_word, frequent), (rare_word, rare), (_, absent) = list(words.items())[:3]
    texts = [f"{frequent_word} {frequent_word} {frequent_word} {rare_word}"] * 30
    before, after = (token_embeddings(static_body(teacher_body, counted, dimension=WIDTH)) for counted in ([], texts))
    share = np.zeros(len(before))
    share[[frequent, rare]] = 0.75, 0.25
    a = 1e-3
    np.testing.assert_allclose(after, before * (a / (a + share))[:, None], rtol=1e-5)
    ratios = np.linalg.norm(after, axis=1) / np.linalg.norm(before, axis=1)
    assert ratios[frequent] < ratios[rare] < ratios[absent]


def test_tokens_are_counted_in_all_texts(teacher_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [row["text"] for row in newswire("eval")]
    expected = token_embeddings(static_body(teacher_body, texts, dimension=8))
    monkeypatch.setattr("setfit_kd.models.static._TOKENIZE_CHUNK", 7)
    np.testing.assert_array_equal(token_embeddings(static_body(teacher_body, texts, dimension=8)), expected)


@pytest.mark.parametrize("dimension", [2, 31, 32])
def test_static_body_has_requested_dimension(teacher_body: SentenceTransformer, dimension: int) -> None:
    body = static_body(teacher_body, [], dimension=dimension)
    assert body.get_embedding_dimension() == dimension
    assert token_embeddings(body).shape == (get_tokenizer(teacher_body).get_vocab_size(), dimension)
    assert body.encode(TEXTS, show_progress_bar=False).shape == (len(TEXTS), dimension)


def cosines(rows: Floats) -> Floats:
    """Return the cosines of all pairs of different rows."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    values: Floats = (unit @ unit.T)[np.triu_indices(len(rows), 1)]
    return values


def test_dimension_reduction_preserves_similarities(teacher_body: SentenceTransformer) -> None:
    embeddings = embed_tokens(teacher_body)
    reduced = token_embeddings(static_body(teacher_body, [], dimension=WIDTH - 1))
    centered = (embeddings - embeddings.mean(axis=0))[::5]
    assert spearmanr(cosines(reduced[::5]), cosines(centered)).statistic > 0.99


def test_static_body_is_reproducible(teacher_body: SentenceTransformer) -> None:
    first, second = (token_embeddings(static_body(teacher_body, TEXTS, dimension=8)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_static_body_can_be_saved_and_loaded(teacher_body: SentenceTransformer, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    body = static_body(teacher_body, TEXTS, dimension=8)
    body.save_pretrained(str(tmp_path / "body"), create_model_card=False)
    expected = body.encode(TEXTS, show_progress_bar=False)
    for loaded in (SentenceTransformer(str(tmp_path / "body"), device="cpu"), load_body(tmp_path / "body")):
        assert is_static(loaded)
        np.testing.assert_array_equal(loaded.encode(TEXTS, show_progress_bar=False), expected)


def test_static_student_learns_from_signals(teacher_body: SentenceTransformer) -> None:
    signals = pool_signals()
    assert signals.embeddings is not None

    def train(learning_rate: float) -> tuple[SetFitModel, float, float]:
        body = static_body(teacher_body, signals.texts, dimension=4)
        settings = {**QUICK, "objective": "similarity,soft-labels=3", "epochs": 20, "freeze_embeddings": True}
        model = train_student(signals, body, labeled=few_labels(), **{**settings, "learning_rate": learning_rate})
        geometry = spearmanr(cosines(embed(model.model_body, signals.texts)), cosines(np.asarray(signals.embeddings)))
        agreement = np.minimum(predict_proba(model, signals.texts), signals.probabilities).sum(axis=1).mean()
        return model, float(geometry.statistic), float(agreement)

    untrained, geometry_before, agreement_before = train(1e-12)
    student, geometry, agreement = train(1e-2)
    # freeze_embeddings does not apply to a body that has only embeddings.
    assert np.abs(token_embeddings(student.model_body) - token_embeddings(untrained.model_body)).max() > 1e-2
    assert geometry > geometry_before + 0.2
    assert agreement > agreement_before + 0.05


def documented_learning_rates(setting: str) -> tuple[float, float]:
    """Read the default learning rates of a network and of a static body from the setting's help text."""
    match = re.search(r"\[default: (\S+); (\S+) for a static body,", RunConfig.model_fields[setting].description or "")
    assert match is not None
    return float(match[1]), float(match[2])


def test_default_learning_rate_of_student_depends_on_body(
    tiny_student: Path, teacher_body: SentenceTransformer
) -> None:
    def static(rate: float | None) -> list[torch.Tensor]:
        body = static_body(teacher_body, [], dimension=8)
        return weights(train_student(pool_signals(), body, **{**QUICK, "learning_rate": rate}))

    def transformer(rate: float | None) -> list[torch.Tensor]:
        return weights(train_student(pool_signals(), tiny_student, **{**QUICK, "learning_rate": rate}))

    default, default_static = documented_learning_rates("learning_rate")
    assert default_static > default
    assert equal_weights(static(None), static(default_static))
    assert not equal_weights(static(None), static(default))
    assert equal_weights(transformer(None), transformer(default))


def test_default_learning_rate_of_teacher_depends_on_body(
    tiny_student: Path, teacher_body: SentenceTransformer
) -> None:
    settings: dict[str, Any] = {"device": "cpu", "precision": "fp32", "teacher_steps": 2, "teacher_batch_size": 8}

    def static(rate: float | None) -> list[torch.Tensor]:
        body = static_body(teacher_body, [], dimension=8)
        return weights(train_teacher(few_labels(), body, teacher_learning_rate=rate, **settings))

    def transformer(rate: float | None) -> list[torch.Tensor]:
        return weights(train_teacher(few_labels(), tiny_student, teacher_learning_rate=rate, **settings))

    default, default_static = documented_learning_rates("teacher_learning_rate")
    assert default_static > default
    assert equal_weights(static(None), static(default_static))
    assert not equal_weights(static(None), static(default))
    assert equal_weights(transformer(None), transformer(default))


# Several students in one run


SMALL: dict[str, Any] = {**FAST, "pool_size": 64, "cache": False}


def small_run(teacher: Path, students: Any, **settings: Any) -> RunResult:
    return distill(*["bundled:newswire"] * 3, teacher=str(teacher), student=students, **{**SMALL, **settings})


@dataclass(frozen=True)
class SeveralStudents:
    """A run of three students, with the names of the functions that it called."""

    names: tuple[str, ...]
    folder: Path
    result: RunResult
    calls: tuple[str, ...]


SLUGS = ("student", "layers-2", "static-8")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path) -> SeveralStudents:
    names = (str(tiny_student), "layers:2", "static:8")
    folder = tmp_path_factory.mktemp("runs") / "run"
    calls: list[str] = []

    def record_calls(module: Any, name: str) -> Any:
        function = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs.get("description", name))
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module, name in (
            (teacher_stages, "train_teacher"),
            (teacher_stages, "refine_and_score"),
            (student_stages, "train_student"),
            (student_stages, "train_teacher"),
        ):
            monkeypatch.setattr(module, name, record_calls(module, name))
        result = small_run(tiny_teacher, list(names), output_dir=folder)
    return SeveralStudents(names, folder, result, tuple(calls))


def test_teacher_is_trained_and_pool_scored_once(several: SeveralStudents) -> None:
    assert several.calls == (
        *("train_teacher", "refine_and_score"),
        *("train_student", "Training baseline") * 3,
    )


def test_each_student_has_its_folder_and_metrics(several: SeveralStudents) -> None:
    assert {path.name for path in (several.folder / "students").iterdir()} == set(SLUGS)
    assert not (several.folder / "student").exists()
    metrics = json.loads((several.folder / "metrics.json").read_text(encoding="utf-8"))
    rows = [row for slug in SLUGS for row in (f"baselines/{slug}", f"students/{slug}")]
    assert list(metrics) == ["teacher", *rows]
    assert metrics == several.result.metrics
    assert metrics["students/static-8"]["parameters"] < metrics["students/student"]["parameters"]
    assert list(several.result.students) == list(several.names)
    assert several.result.student is several.result.students[several.names[0]]


@pytest.mark.parametrize("number", range(3), ids=SLUGS)
def test_student_does_not_depend_on_other_students(several: SeveralStudents, number: int, tiny_teacher: Path) -> None:
    alone = small_run(tiny_teacher, several.names[number]).evaluations
    together = several.result.evaluations
    for name_alone, name_together in (
        ("teacher", "teacher"),
        ("student", f"students/{SLUGS[number]}"),
        ("baseline", f"baselines/{SLUGS[number]}"),
    ):
        assert alone[name_alone].quality == together[name_together].quality
        np.testing.assert_array_equal(alone[name_alone].probabilities, together[name_together].probabilities)


def test_loading_run_of_several_students_lists_them(several: SeveralStudents) -> None:
    with pytest.raises(ModelError, match="3 students: layers-2, static-8, student") as raised:
        load(several.folder, device="cpu")
    assert f"{several.folder}/students/layers-2" in str(raised.value.hint)
    predicted = invoke("predict", several.folder, "a text", "--device", "cpu")
    assert predicted.exit_code == 2
    assert "students/layers-2" in predicted.stderr


@pytest.mark.parametrize("number", range(3), ids=SLUGS)
def test_each_student_can_be_loaded_from_its_folder(several: SeveralStudents, number: int) -> None:
    texts = [row["text"] for row in newswire("eval")[:20]]
    model = load(several.folder / "students" / SLUGS[number], device="cpu")
    expected = predict_proba(several.result.students[several.names[number]], texts)
    np.testing.assert_allclose(predict_proba(model, texts), expected, atol=1e-6)


def test_evaluating_a_loaded_student_reproduces_its_confusion_matrix(several: SeveralStudents) -> None:
    model = load(several.folder / "students" / "static-8", device="cpu")
    evaluation = evaluate(model, "bundled:newswire")
    assert evaluation.quality.confusion == several.result.evaluations["students/static-8"].quality.confusion


def test_config_of_several_students_can_be_read_back(several: SeveralStudents) -> None:
    saved_config = read_config(several.folder / "config.yaml")
    assert saved_config["student"] == list(several.names)
    assert RunConfig.of(**saved_config) == several.result.config


def test_single_student_is_a_string_in_config_and_has_folder_student(tiny_teacher: Path, tmp_path: Path) -> None:
    result = small_run(tiny_teacher, ["layers:2"], output_dir=tmp_path / "run")
    saved_config = read_config(tmp_path / "run" / "config.yaml")
    assert saved_config["student"] == "layers:2"
    assert RunConfig.of(**saved_config) == result.config
    assert (tmp_path / "run" / "student").is_dir()
    assert not (tmp_path / "run" / "students").exists()
    assert list(result.evaluations) == ["teacher", "baseline", "student"]


PRINTABLE = st.characters(exclude_categories=["Cc", "Cs"])
STUDENT_NAMES = st.lists(st.text(PRINTABLE, min_size=1).filter(str.strip), min_size=1, unique=True)


@given(STUDENT_NAMES)
def test_any_student_names_can_be_read_back_from_yaml(names: list[str]) -> None:
    config = RunConfig.of(student=names)
    read_back = yaml.safe_load(config.to_yaml())
    assert isinstance(read_back["student"], str if len(names) == 1 else list)
    assert RunConfig.of(**read_back) == config


def test_overwrite_removes_folders_of_several_students(
    several: SeveralStudents, tiny_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(several.folder, tmp_path / "run")
    small_run(tiny_teacher, "layers:1", output_dir=tmp_path / "run", overwrite=True, baseline=False)
    assert not (tmp_path / "run" / "students").exists()
    assert load(tmp_path / "run", device="cpu").labels


@pytest.mark.parametrize("names", [[], ["layers:2", "static:8", "layers:2"], ["layers:2", " "], ["a\0b"], [3]])
def test_invalid_student_names_raise_error(names: list[Any]) -> None:
    with pytest.raises(ConfigError, match="student"):
        RunConfig.of(student=names)


def test_duplicate_student_flag_raises_error(tiny_teacher: Path, tmp_path: Path) -> None:
    result = invoke(
        *("run", "--preset", "newswire", "--teacher", tiny_teacher, "--output-dir", "out"),
        *("--student", "layers:2", "--student", "layers:2"),
    )
    assert result.exit_code == 2
    assert "layers:2 is listed twice" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def command_run(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> tuple[Path, str]:
    """Folder of a run of two students on the command line, and its output."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "cache"]
    result = invoke(
        *("run", "--preset", "newswire", "--teacher", tiny_teacher, "--output-dir", folder, "--no-cache", *flags),
        *("--student", "layers:1", "--student", f"static:2@{tiny_teacher}"),
    )
    assert result.exit_code == 0, result.stderr
    return folder, result.stdout


def test_several_student_flags(command_run: tuple[Path, str]) -> None:
    folder, output = command_run
    assert {path.name for path in (folder / "students").iterdir()} == {"layers-1", "static-2-teacher"}
    assert list(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))) == [
        *("teacher", "baselines/layers-1", "students/layers-1"),
        *("baselines/static-2-teacher", "students/static-2-teacher"),
    ]
    row_names = [re.split(r"\s{2,}", line)[0] for line in output.splitlines() if line.count("%") > 1]
    students = [name for slug in ("layers-1", "static-2-teacher") for name in (f"{slug} (baseline)", slug)]
    assert row_names == ["teacher", *students]
    assert f"setfit-kd predict {folder}/students/layers-1" in output


def test_table_contains_complete_numbers(command_run: tuple[Path, str]) -> None:
    folder, output = command_run
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    rows = [line for line in output.splitlines() if line.count("%") > 1]
    for row, model_metrics in zip(rows, metrics.values(), strict=True):
        assert row.split()[-1] == f"{model_metrics['texts_per_second']:,.0f}"


def test_student_flags_override_students_in_config_file(tiny_teacher: Path) -> None:
    Path("settings.yaml").write_text("student: [layers:1, layers:3]\n", encoding="utf-8")
    command = ["run", "--preset", "newswire", "--teacher", tiny_teacher, "--device", "cpu", "--dry-run"]
    from_file = invoke(*command, "--config", "settings.yaml")
    assert "student:\n- layers:1\n- layers:3\n" in from_file.stdout, from_file.stderr
    from_flags = invoke(*command, "--config", "settings.yaml", "--student", "layers:2", "--student", "static:4")
    assert "student:\n- layers:2\n- static:4\n" in from_flags.stdout, from_flags.stderr


MODEL_NAMES = st.builds(
    "{}{}".format,
    st.sampled_from(["", "static@", "static:8@", "layers:3@", "layers:0,2@", "demo:", "org/", "/models/", "../"]),
    st.text(st.sampled_from("abA-_./@:, é中\\"), min_size=1, max_size=12),
)


@given(st.lists(MODEL_NAMES, min_size=1, max_size=8, unique=True))
def test_folder_names_are_distinct_and_valid(names: list[str]) -> None:
    assume(all(name.strip() for name in names))
    slugs = folder_names(names)
    assert len(slugs) == len(names)
    assert len(set(slugs)) == len(names)
    for slug in slugs:
        assert re.fullmatch(r"[\w][\w.-]*", slug)
        assert Path(slug).name == slug


def test_folder_names_differ_by_more_than_case() -> None:
    slugs = folder_names(["models/Mini", "models/mini", "MINI"])
    assert len({slug.casefold() for slug in slugs}) == 3, slugs  # some file systems ignore case


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["sentence-transformers/all-MiniLM-L6-v2"], ["all-MiniLM-L6-v2"]),
        (["demo:all-MiniLM-L6-v2"], ["all-MiniLM-L6-v2"]),
        (["layers:0,2,5", "layers:3", "static", "static:64"], ["layers-0-2-5", "layers-3", "static", "static-64"]),
        (["static:64@org/name", "layers:3@folder/"], ["static-64-name", "layers-3-folder"]),
        (
            ["transformer:org/bert", "bert", "static@transformer:bert"],
            ["transformer-bert", "bert", "static-transformer-bert"],
        ),
        (["blank:configs/small"], ["blank-small"]),
        (["one/same", "two/same", "same-2"], ["same", "same-2", "same-2-2"]),
        (["/a/b/", ".."], ["b", "student"]),
    ],
)
def test_folder_name_is_derived_from_model_name(names: list[str], expected: list[str]) -> None:
    assert folder_names(names) == expected
