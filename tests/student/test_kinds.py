"""Which bodies students may have, bodies of a vector a token, and several students in one run."""

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
from synthetic import QUICK, few_labels, pool_signals, same, weights

from setfit_kd import RunConfig, RunResult, distill, evaluate, load, train_student, train_teacher
from setfit_kd.cli import main
from setfit_kd.config import read_config
from setfit_kd.errors import ConfigError, ModelError, SetFitKDError
from setfit_kd.memory import shared_backoff
from setfit_kd.models import embed, embed_tokens, is_static, load_body, predict_proba, static_body
from setfit_kd.run import student_stages as stages_module
from setfit_kd.run import teacher_stages as teaching_module
from setfit_kd.student import folder_names, locate_student, student_body
from setfit_kd.student.kinds import spread_evenly

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel
    from tokenizers import Tokenizer

Floats = npt.NDArray[np.floating]
WIDTH = 32
"""Of the tiny teacher."""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# Names


@pytest.fixture(scope="session")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_body(tmp_path_factory.mktemp("models") / "six", layers=6, width=16, seed=2)


@pytest.fixture(scope="session")
def static_folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "static-folder"
    static_body(load_body(tiny_teacher), [], dimension=8).save_pretrained(str(folder), create_model_card=False)
    return folder


def queries(body: SentenceTransformer) -> list[torch.Tensor]:
    """A weight of each layer, by which layers are told apart."""
    encoder: Any = body[0]
    return [layer.attention.self.query.weight.detach() for layer in encoder.auto_model.encoder.layer]


def layers_in(body: SentenceTransformer, whole: SentenceTransformer) -> tuple[int, ...]:
    """Which layers of the whole body the other one has."""
    originals = queries(whole)
    return tuple(
        next(i for i, original in enumerate(originals) if torch.equal(original, query)) for query in queries(body)
    )


def table_of(body: SentenceTransformer) -> Floats:
    """(n_tokens, d) of a static body."""
    static: Any = body[0]
    found: Floats = static.embedding.weight.detach().numpy()
    return found


def tokenizer_of(body: SentenceTransformer) -> Tokenizer:
    transformer: Any = body
    found: Tokenizer = transformer.tokenizer.backend_tokenizer
    return found


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
def test_layers_are_cut_out_of_the_teacher(name: str, expected: tuple[int, ...], six_layers: Path) -> None:
    teacher = load_body(six_layers)
    student = student_body(locate_student(name), teacher=teacher)
    assert layers_in(student, teacher) == expected
    assert len(queries(teacher)) == 6  # the teacher is as it was


@pytest.mark.parametrize(("name", "expected"), [("layers:2", (0, 5)), ("layers:4,1", (4, 1))])
def test_layers_may_be_those_of_another_model(
    name: str, expected: tuple[int, ...], six_layers: Path, teacher_body: SentenceTransformer
) -> None:
    student = student_body(locate_student(f"{name}@{six_layers}"), teacher=teacher_body)
    assert layers_in(student, load_body(six_layers)) == expected


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
def test_a_number_of_layers_is_spread_evenly(number: int, total: int, expected: tuple[int, ...]) -> None:
    assert spread_evenly(number, total) == expected


@given(st.integers(1, 200).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total))))
def test_layers_spread_evenly_reach_from_the_first_to_the_last(sizes: tuple[int, int]) -> None:
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
def test_a_static_student_has_the_vectors_of_the_teacher(dimension: int, teacher_body: SentenceTransformer) -> None:
    student = student_body(locate_student(f"static:{dimension}"), teacher=teacher_body, texts=TEXTS)
    assert is_static(student)
    np.testing.assert_array_equal(table_of(student), table_of(static_body(teacher_body, TEXTS, dimension=dimension)))


def test_a_static_students_vectors_are_those_of_the_teacher_after_its_fine_tuning(
    tiny_teacher: Path, teacher_body: SentenceTransformer
) -> None:
    prepared = locate_student("static:8").prepare(teacher_body)
    tuned = load_body(tiny_teacher)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.01)
    student = prepared.make(tuned, TEXTS, tuned.device)
    np.testing.assert_array_equal(table_of(student), table_of(static_body(tuned, TEXTS, dimension=8)))
    assert not np.array_equal(table_of(student), table_of(static_body(teacher_body, TEXTS, dimension=8)))


def test_a_static_student_may_have_the_vectors_of_another_model(
    tiny_student: Path, teacher_body: SentenceTransformer
) -> None:
    student = student_body(locate_student(f"static:8@{tiny_student}"), teacher=teacher_body, texts=TEXTS)
    expected = static_body(load_body(tiny_student), TEXTS, dimension=8)
    np.testing.assert_array_equal(table_of(student), table_of(expected))


def test_a_static_student_has_128_dimensions_unless_told_otherwise(tmp_path: Path) -> None:
    wide = load_body(make_body(tmp_path / "wide", layers=1, width=144))
    student = student_body(locate_student("static"), teacher=wide)
    assert student.get_embedding_dimension() == 128


@pytest.mark.parametrize("name", ["static-mini", "statics", "static:8", "layers-3", "layers:2", "layers:x"])
def test_a_folder_is_a_folder_whatever_its_name_begins_with(
    name: str, tiny_student: Path, teacher_body: SentenceTransformer
) -> None:
    Path(name).symlink_to(tiny_student)
    student = student_body(locate_student(name), teacher=teacher_body)
    assert same(list(student.state_dict().values()), list(load_body(tiny_student).state_dict().values()))


WRONG: list[tuple[str, type[SetFitKDError], str]] = [
    ("layers", ConfigError, "'layers:' does not name layers"),
    ("layers:", ConfigError, "'layers:' does not name layers"),
    ("layers:x", ConfigError, "'layers:x' does not name layers"),
    ("layers:1,", ConfigError, "'layers:1,' does not name layers"),
    ("layers:-1", ConfigError, "'layers:-1' does not name layers"),
    ("layers:1.5", ConfigError, "'layers:1.5' does not name layers"),
    ("layers:x@STUDENT", ConfigError, "'layers:x' does not name layers"),
    ("layers:x@nobody/has-this", ConfigError, "'layers:x' does not name layers"),  # before anything is downloaded
    ("layers:5", ModelError, "of a body with 4"),
    ("layers:0,4", ModelError, "of a body with 4"),
    ("layers:1,1", ModelError, "of a body with 4"),
    ("layers:3@STUDENT", ModelError, "of a body with 2"),
    ("layers:2@STATIC", ModelError, "transformer"),
    ("layers:2@./nowhere", ModelError, "no model folder ./nowhere"),
    ("static:0", ConfigError, "'static:0' does not name a number of dimensions"),
    ("static:1", ConfigError, "'static:1' does not name a number of dimensions"),
    ("static:x", ConfigError, "'static:x' does not name a number of dimensions"),
    ("static:8.5", ConfigError, "'static:8.5' does not name a number of dimensions"),
    ("static:8,4", ConfigError, "'static:8,4' does not name a number of dimensions"),
    ("static:1@nobody/has-this", ConfigError, "'static:1' does not name a number of dimensions"),
    ("static", ModelError, "32 dimensions, 128 are asked for"),
    ("static:33", ModelError, "32 dimensions, 33 are asked for"),
    ("static:17@STUDENT", ModelError, "16 dimensions, 17 are asked for"),
    ("static:8@STATIC", ModelError, "transformer"),
    ("static:8@./nowhere", ModelError, "no model folder ./nowhere"),
]


@pytest.mark.parametrize(("name", "error", "fragment"), WRONG)
def test_a_wrong_name_is_told_before_anything_is_trained(
    name: str,
    error: type[SetFitKDError],
    fragment: str,
    tiny_teacher: Path,
    tiny_student: Path,
    static_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teaching_module, "train_teacher", lambda *_, **__: pytest.fail("training began"))
    name = name.replace("STUDENT", str(tiny_student)).replace("STATIC", str(static_folder))
    students = [str(tiny_student), name]
    with pytest.raises(error, match=re.escape(fragment)) as raised:
        small_run(tiny_teacher, students, output_dir=tmp_path / "run")
    assert raised.value.hint
    assert not (tmp_path / "run").exists()


def test_a_static_teacher_has_no_vectors_to_give(static_folder: Path) -> None:
    for name in ("static:8", "layers:1"):
        with pytest.raises(ModelError, match="transformer") as raised:
            locate_student(name).prepare(load_body(static_folder))
        assert raised.value.hint


# Vectors of tokens


CLS, SEP = 2, 3


@pytest.mark.parametrize(("before", "after"), [((CLS,), (SEP,)), ((), ()), ((SEP,), ())])
def test_a_tokens_vector_is_the_embedding_of_the_token_alone(
    before: tuple[int, ...], after: tuple[int, ...], student_body: SentenceTransformer
) -> None:
    from tokenizers import processors

    tokenizer = tokenizer_of(student_body)
    template = " ".join(["[SEP]" if token == SEP else "[CLS]" for token in before] + ["$A"] + ["[SEP]"] * len(after))
    specials = [("[CLS]", CLS), ("[SEP]", SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    found = embed_tokens(student_body)
    assert found.dtype == np.float32
    assert len(found) == tokenizer.get_vocab_size()
    encoder: Any = student_body[0]
    for token in range(0, len(found), 20):
        ids = torch.tensor([[*before, token, *after]])
        with torch.inference_mode():
            hidden = encoder.auto_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        np.testing.assert_allclose(found[token], hidden[0].mean(dim=0), atol=1e-5)
    assert np.ptp(found, axis=0).min() > 0.01  # not all alike


@pytest.mark.parametrize("batch_size", [64, 999, 100_000])
def test_the_batch_size_changes_no_tokens_vector(student_body: SentenceTransformer, batch_size: int) -> None:
    expected = embed_tokens(student_body)
    np.testing.assert_allclose(embed_tokens(student_body, batch_size=batch_size), expected, atol=1e-6)


def test_a_tokenizer_that_pads_changes_no_tokens_vector(student_body: SentenceTransformer) -> None:
    expected = embed_tokens(student_body)
    tokenizer_of(student_body).enable_padding(length=16)
    np.testing.assert_allclose(embed_tokens(student_body), expected, atol=1e-6)
    assert tokenizer_of(student_body).padding is not None  # it was left as it is


def test_tokens_that_do_not_fit_at_once_pass_in_smaller_batches(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    expected = embed_tokens(student_body)
    forward, passed = SentenceTransformer.forward, list[int]()

    def limited(body: Any, features: dict[str, Any], **kwargs: Any) -> Any:
        texts = len(features["input_ids"])
        if texts > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        passed.append(texts)
        return forward(body, features, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "forward", limited)
    with shared_backoff() as events:
        found = embed_tokens(student_body, batch_size=1024)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert sum(passed) == len(expected)
    assert events[-1].after.size == 128
    assert {event.phase for event in events} == {"Reading vocabulary"}


# Static bodies


def words_of(body: SentenceTransformer) -> dict[str, int]:
    """Texts of a single token, with that token."""
    tokenizer = tokenizer_of(body)
    return {
        word: token
        for word, token in tokenizer.get_vocab().items()
        if word.isalpha() and tokenizer.encode(word, add_special_tokens=False).ids == [token]
    }


def test_a_text_of_one_token_is_that_tokens_vector(teacher_body: SentenceTransformer) -> None:
    body = static_body(teacher_body, [], dimension=WIDTH)
    words = words_of(teacher_body)
    assert len(words) > 500
    found = body.encode(list(words), show_progress_bar=False)
    np.testing.assert_allclose(found, embed_tokens(teacher_body)[list(words.values())], atol=1e-6)


def test_a_text_is_the_mean_of_its_tokens(teacher_body: SentenceTransformer) -> None:
    body = static_body(teacher_body, TEXTS, dimension=8)
    texts = [row["text"] for row in newswire("eval")[:50]]
    encoded = tokenizer_of(teacher_body).encode_batch(texts, add_special_tokens=False)
    expected = np.stack([table_of(body)[text.ids].mean(axis=0) for text in encoded])
    np.testing.assert_allclose(body.encode(texts, show_progress_bar=False), expected, atol=1e-6)


def test_a_long_text_is_not_cut(teacher_body: SentenceTransformer) -> None:
    body = static_body(teacher_body, [], dimension=WIDTH)
    (one, first), (other, second) = list(words_of(teacher_body).items())[:2]
    found = body.encode(f"{f'{one} ' * 100}{f'{other} ' * 300}", show_progress_bar=False)
    np.testing.assert_allclose(found, (table_of(body)[first] + 3 * table_of(body)[second]) / 4, atol=1e-5)


def test_frequent_tokens_weigh_less(teacher_body: SentenceTransformer) -> None:
    words = words_of(teacher_body)
    (often, many), (seldom, few), (_, none) = list(words.items())[:3]
    texts = [f"{often} {often} {often} {seldom}"] * 30
    before, after = (table_of(static_body(teacher_body, counted, dimension=WIDTH)) for counted in ([], texts))
    share = np.zeros(len(before))
    share[[many, few]] = 0.75, 0.25
    a = 1e-3
    np.testing.assert_allclose(after, before * (a / (a + share))[:, None], rtol=1e-5)
    ratios = np.linalg.norm(after, axis=1) / np.linalg.norm(before, axis=1)
    assert ratios[many] < ratios[few] < ratios[none]


def test_every_text_is_counted(teacher_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [row["text"] for row in newswire("eval")]
    expected = table_of(static_body(teacher_body, texts, dimension=8))
    monkeypatch.setattr("setfit_kd.models.static._COUNTED", 7)
    np.testing.assert_array_equal(table_of(static_body(teacher_body, texts, dimension=8)), expected)


@pytest.mark.parametrize("dimension", [2, 31, 32])
def test_vectors_are_as_long_as_asked_for(teacher_body: SentenceTransformer, dimension: int) -> None:
    body = static_body(teacher_body, [], dimension=dimension)
    assert body.get_embedding_dimension() == dimension
    assert table_of(body).shape == (tokenizer_of(teacher_body).get_vocab_size(), dimension)
    assert body.encode(TEXTS, show_progress_bar=False).shape == (len(TEXTS), dimension)


def cosines(rows: Floats) -> Floats:
    """Above the diagonal."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = (unit @ unit.T)[np.triu_indices(len(rows), 1)]
    return found


def test_shorter_vectors_lie_as_the_long_ones_did(teacher_body: SentenceTransformer) -> None:
    whole = embed_tokens(teacher_body)
    reduced = table_of(static_body(teacher_body, [], dimension=WIDTH - 1))
    centred = (whole - whole.mean(axis=0))[::5]
    assert spearmanr(cosines(reduced[::5]), cosines(centred)).statistic > 0.99


def test_a_static_body_is_made_the_same_twice(teacher_body: SentenceTransformer) -> None:
    one, other = (table_of(static_body(teacher_body, TEXTS, dimension=8)) for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_a_static_body_is_saved_and_loaded(teacher_body: SentenceTransformer, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    body = static_body(teacher_body, TEXTS, dimension=8)
    body.save_pretrained(str(tmp_path / "body"), create_model_card=False)
    expected = body.encode(TEXTS, show_progress_bar=False)
    for again in (SentenceTransformer(str(tmp_path / "body"), device="cpu"), load_body(tmp_path / "body")):
        assert is_static(again)
        np.testing.assert_array_equal(again.encode(TEXTS, show_progress_bar=False), expected)


def test_a_static_student_comes_to_agree_with_the_signals(teacher_body: SentenceTransformer) -> None:
    signals = pool_signals()
    assert signals.embeddings is not None

    def trained(learning_rate: float) -> tuple[SetFitModel, float, float]:
        body = static_body(teacher_body, signals.texts, dimension=4)
        settings = {**QUICK, "objective": "similarity,soft-labels=3", "epochs": 20, "freeze_embeddings": True}
        model = train_student(signals, body, labeled=few_labels(), **{**settings, "learning_rate": learning_rate})
        geometry = spearmanr(cosines(embed(model.model_body, signals.texts)), cosines(np.asarray(signals.embeddings)))
        shared = np.minimum(predict_proba(model, signals.texts), signals.probabilities).sum(axis=1).mean()
        return model, float(geometry.statistic), float(shared)

    untrained, geometry_before, shared_before = trained(1e-12)
    student, geometry, shared = trained(1e-2)
    # Frozen embeddings are for bodies that have more than them.
    assert np.abs(table_of(student.model_body) - table_of(untrained.model_body)).max() > 1e-2
    assert geometry > geometry_before + 0.2
    assert shared > shared_before + 0.05


def documented_rates(setting: str) -> tuple[float, float]:
    """The usual learning rates of a transformer and of a static body, as the setting's help has them."""
    found = re.search(r"\[(\S+); (\S+) for a static body,", RunConfig.model_fields[setting].description or "")
    assert found is not None
    return float(found[1]), float(found[2])


def test_the_usual_learning_rate_of_a_student_is_that_of_its_kind(
    tiny_student: Path, teacher_body: SentenceTransformer
) -> None:
    def static(rate: float | None) -> list[torch.Tensor]:
        body = static_body(teacher_body, [], dimension=8)
        return weights(train_student(pool_signals(), body, **{**QUICK, "learning_rate": rate}))

    def transformer(rate: float | None) -> list[torch.Tensor]:
        return weights(train_student(pool_signals(), tiny_student, **{**QUICK, "learning_rate": rate}))

    usual, usual_static = documented_rates("learning_rate")
    assert usual_static > usual
    assert same(static(None), static(usual_static))
    assert not same(static(None), static(usual))
    assert same(transformer(None), transformer(usual))


def test_the_usual_learning_rate_of_a_teacher_is_that_of_its_kind(
    tiny_student: Path, teacher_body: SentenceTransformer
) -> None:
    settings: dict[str, Any] = {"device": "cpu", "precision": "fp32", "teacher_steps": 2, "teacher_batch_size": 8}

    def static(rate: float | None) -> list[torch.Tensor]:
        body = static_body(teacher_body, [], dimension=8)
        return weights(train_teacher(few_labels(), body, teacher_learning_rate=rate, **settings))

    def transformer(rate: float | None) -> list[torch.Tensor]:
        return weights(train_teacher(few_labels(), tiny_student, teacher_learning_rate=rate, **settings))

    usual, usual_static = documented_rates("teacher_learning_rate")
    assert usual_static > usual
    assert same(static(None), static(usual_static))
    assert not same(static(None), static(usual))
    assert same(transformer(None), transformer(usual))


# Several students in one run


SMALL: dict[str, Any] = {**FAST, "pool_size": 64, "cache": False}


def small_run(teacher: Path, students: Any, **settings: Any) -> RunResult:
    return distill(*["bundled:newswire"] * 3, teacher=str(teacher), student=students, **{**SMALL, **settings})


@dataclass(frozen=True)
class Several:
    """A run of three students, with what was called for it."""

    names: tuple[str, ...]
    folder: Path
    result: RunResult
    calls: tuple[str, ...]


SLUGS = ("student", "layers-2", "static-8")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path) -> Several:
    names = (str(tiny_student), "layers:2", "static:8")
    folder = tmp_path_factory.mktemp("runs") / "run"
    calls: list[str] = []

    def counted(module: Any, name: str) -> Any:
        function = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs.get("description", name))
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module, name in (
            (teaching_module, "train_teacher"),
            (teaching_module, "refine_and_score"),
            (stages_module, "train_student"),
            (stages_module, "train_teacher"),
        ):
            monkeypatch.setattr(module, name, counted(module, name))
        result = small_run(tiny_teacher, list(names), output_dir=folder)
    return Several(names, folder, result, tuple(calls))


def test_the_teacher_is_trained_and_the_pool_scored_once(several: Several) -> None:
    assert several.calls == (
        *("train_teacher", "refine_and_score"),
        *("train_student", "Training baseline") * 3,
    )


def test_each_student_has_a_folder_and_rows_of_its_own(several: Several) -> None:
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
def test_a_student_in_company_is_what_it_is_alone(several: Several, number: int, tiny_teacher: Path) -> None:
    alone = small_run(tiny_teacher, several.names[number]).evaluations
    together = several.result.evaluations
    for mine, theirs in (
        ("teacher", "teacher"),
        ("student", f"students/{SLUGS[number]}"),
        ("baseline", f"baselines/{SLUGS[number]}"),
    ):
        assert alone[mine].quality == together[theirs].quality
        np.testing.assert_array_equal(alone[mine].probabilities, together[theirs].probabilities)


def test_a_run_of_several_students_says_which_there_are(several: Several) -> None:
    with pytest.raises(ModelError, match="3 students: layers-2, static-8, student") as raised:
        load(several.folder, device="cpu")
    assert f"{several.folder}/students/layers-2" in str(raised.value.hint)
    predicted = invoke("predict", several.folder, "a text", "--device", "cpu")
    assert predicted.exit_code == 2
    assert "students/layers-2" in predicted.stderr


@pytest.mark.parametrize("number", range(3), ids=SLUGS)
def test_each_student_is_loaded_by_its_folder(several: Several, number: int) -> None:
    texts = [row["text"] for row in newswire("eval")[:20]]
    model = load(several.folder / "students" / SLUGS[number], device="cpu")
    expected = predict_proba(several.result.students[several.names[number]], texts)
    np.testing.assert_allclose(predict_proba(model, texts), expected, atol=1e-6)


def test_the_students_of_a_run_are_evaluated_as_recorded(several: Several) -> None:
    model = load(several.folder / "students" / "static-8", device="cpu")
    again = evaluate(model, "bundled:newswire")
    assert again.quality.confusion == several.result.evaluations["students/static-8"].quality.confusion


def test_the_config_of_several_students_reads_back(several: Several) -> None:
    written = read_config(several.folder / "config.yaml")
    assert written["student"] == list(several.names)
    assert RunConfig.of(**written) == several.result.config


def test_the_config_of_one_student_is_a_plain_string_and_its_folder_student(tiny_teacher: Path, tmp_path: Path) -> None:
    result = small_run(tiny_teacher, ["layers:2"], output_dir=tmp_path / "run")
    written = read_config(tmp_path / "run" / "config.yaml")
    assert written["student"] == "layers:2"
    assert RunConfig.of(**written) == result.config
    assert (tmp_path / "run" / "student").is_dir()
    assert not (tmp_path / "run" / "students").exists()
    assert list(result.evaluations) == ["teacher", "baseline", "student"]


PRINTABLE = st.characters(exclude_categories=["Cc", "Cs"])
NAMES = st.lists(st.text(PRINTABLE, min_size=1).filter(str.strip), min_size=1, unique=True)


@given(NAMES)
def test_any_students_read_back_from_yaml(names: list[str]) -> None:
    config = RunConfig.of(student=names)
    read_back = yaml.safe_load(config.to_yaml())
    assert isinstance(read_back["student"], str if len(names) == 1 else list)
    assert RunConfig.of(**read_back) == config


def test_a_run_of_one_takes_the_place_of_a_run_of_several(several: Several, tiny_teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(several.folder, tmp_path / "run")
    small_run(tiny_teacher, "layers:1", output_dir=tmp_path / "run", overwrite=True, baseline=False)
    assert not (tmp_path / "run" / "students").exists()
    assert load(tmp_path / "run", device="cpu").labels


@pytest.mark.parametrize("names", [[], ["layers:2", "static:8", "layers:2"], ["layers:2", " "], ["a\0b"], [3]])
def test_students_that_cannot_be_are_refused(names: list[Any]) -> None:
    with pytest.raises(ConfigError, match="student"):
        RunConfig.of(student=names)


def test_a_student_given_twice_is_refused_on_the_command_line(tiny_teacher: Path, tmp_path: Path) -> None:
    result = invoke(
        *("run", "--preset", "newswire", "--teacher", tiny_teacher, "--output-dir", "out"),
        *("--student", "layers:2", "--student", "layers:2"),
    )
    assert result.exit_code == 2
    assert "layers:2 stands twice" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def by_command(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> tuple[Path, str]:
    """Folder of a run of two students, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "cache"]
    result = invoke(
        *("run", "--preset", "newswire", "--teacher", tiny_teacher, "--output-dir", folder, "--no-cache", *flags),
        *("--student", "layers:1", "--student", f"static:2@{tiny_teacher}"),
    )
    assert result.exit_code == 0, result.stderr
    return folder, result.stdout


def test_students_are_named_one_after_another_on_the_command_line(by_command: tuple[Path, str]) -> None:
    folder, printed = by_command
    assert {path.name for path in (folder / "students").iterdir()} == {"layers-1", "static-2-teacher"}
    assert list(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))) == [
        *("teacher", "baselines/layers-1", "students/layers-1"),
        *("baselines/static-2-teacher", "students/static-2-teacher"),
    ]
    named = [re.split(r"\s{2,}", line)[0] for line in printed.splitlines() if "%" in line]
    students = [name for slug in ("layers-1", "static-2-teacher") for name in (f"{slug} (baseline)", slug)]
    assert named == ["teacher", *students]
    assert f"setfit-kd predict {folder}/students/layers-1" in printed


def test_no_figure_is_cut_off_in_the_table(by_command: tuple[Path, str]) -> None:
    folder, printed = by_command
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    rows = [line for line in printed.splitlines() if "%" in line]
    for row, measured in zip(rows, metrics.values(), strict=True):
        assert row.split()[-1] == f"{measured['texts_per_second']:,.0f}"


def test_students_on_the_command_line_take_the_place_of_those_in_the_file(tiny_teacher: Path) -> None:
    Path("settings.yaml").write_text("student: [layers:1, layers:3]\n", encoding="utf-8")
    command = ["run", "--preset", "newswire", "--teacher", tiny_teacher, "--device", "cpu", "--dry-run"]
    from_file = invoke(*command, "--config", "settings.yaml")
    assert "student:\n- layers:1\n- layers:3\n" in from_file.stdout, from_file.stderr
    from_flags = invoke(*command, "--config", "settings.yaml", "--student", "layers:2", "--student", "static:4")
    assert "student:\n- layers:2\n- static:4\n" in from_flags.stdout, from_flags.stderr


LIKELY = st.builds(
    "{}{}".format,
    st.sampled_from(["", "static@", "static:8@", "layers:3@", "layers:0,2@", "demo:", "org/", "/models/", "../"]),
    st.text(st.sampled_from("abA-_./@:, é中\\"), min_size=1, max_size=12),
)


@given(st.lists(LIKELY, min_size=1, max_size=8, unique=True))
def test_slugs_are_all_different_and_safe_as_file_names(names: list[str]) -> None:
    assume(all(name.strip() for name in names))
    found = folder_names(names)
    assert len(found) == len(names)
    assert len(set(found)) == len(names)
    for slug in found:
        assert re.fullmatch(r"[\w][\w.-]*", slug)
        assert Path(slug).name == slug


def test_slugs_differ_by_more_than_case() -> None:
    found = folder_names(["models/Mini", "models/mini", "MINI"])
    assert len({slug.casefold() for slug in found}) == 3, found  # some file systems take a and A for the same


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
def test_a_slug_is_the_name_in_short(names: list[str], expected: list[str]) -> None:
    assert folder_names(names) == expected
