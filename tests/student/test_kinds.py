"""Kinds of student bodies, static embeddings, and several students in one run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from checks import assert_refused, invoke
from conftest import FAST, make_body, newswire
from hypothesis import assume, given
from hypothesis import strategies as st
from synthetic import QUICK, equal_weights, pool_signals

from setfit_kd import RunConfig, RunResult, distill, evaluate, load, train_student
from setfit_kd.config.presets import read_config
from setfit_kd.errors import ConfigError, ModelError, SetFitKDError
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.models.bodies import is_static, load_body
from setfit_kd.models.encode import embed_tokens
from setfit_kd.models.static import static_body
from setfit_kd.run import stages
from setfit_kd.student import trainer as student
from setfit_kd.student.kinds import folder_names, locate_student, spread_evenly
from setfit_kd.teacher import trainer as teacher
from setfit_kd.training.loop import resolve_learning_rate
from setfit_kd.utils.arrays import normalize_rows
from setfit_kd.utils.files import read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WIDTH = 32
"""Embedding size of the tiny teacher."""
TEXTS = ["the match was lost", "shares rose in the morning", "the vote"]


# Layers and static embeddings by name


@pytest.fixture(scope="session")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_body(tmp_path_factory.mktemp("models") / "six", layers=6, width=16, seed=2)


@pytest.fixture(scope="session")
def static_folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "static-folder"
    static_body(load_body(tiny_teacher), [], dimension=8).save_pretrained(str(folder), create_model_card=False)
    return folder


def create_body(name: str, teacher: SentenceTransformer) -> SentenceTransformer:
    return locate_student(name).prepare(teacher).create_body(teacher, TEXTS, teacher.device)


def query_weights(body: Any) -> list[torch.Tensor]:
    """Return the query weights of each layer, which identify the layer."""
    return [layer.attention.self.query.weight.detach() for layer in body[0].auto_model.encoder.layer]


def token_embeddings(body: Any) -> Any:
    """Return the (n_tokens, d) embeddings of a static body."""
    return body[0].embedding.weight.detach().numpy()


def get_tokenizer(body: Any) -> Any:
    return body.tokenizer.backend_tokenizer


@pytest.mark.parametrize(
    ("name", "expected"), [("layers:5,0", (5, 0)), ("layers:3", (0, 2, 5)), ("layers:2@SIX", (0, 5))]
)
def test_layers_are_copied_from_teacher_or_another_model(
    name: str, expected: tuple[int, ...], six_layers: Path, teacher_body: SentenceTransformer
) -> None:
    original = load_body(six_layers)
    student = create_body(name.replace("SIX", str(six_layers)), teacher_body if "@" in name else original)
    layers = query_weights(original)
    indices = [[torch.equal(layer, query) for layer in layers].index(True) for query in query_weights(student)]
    assert tuple(indices) == expected
    assert len(layers) == 6  # the teacher is unchanged


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


@pytest.mark.parametrize("name", ["static:2", "static:8@STUDENT"])
def test_static_student_has_token_embeddings_of_fine_tuned_teacher_or_another_model(
    name: str, tiny_student: Path, tiny_teacher: Path, teacher_body: SentenceTransformer
) -> None:
    prepared = locate_student(name.replace("STUDENT", str(tiny_student))).prepare(load_body(tiny_teacher))
    with torch.no_grad():
        for parameter in teacher_body.parameters():
            parameter.mul_(1.01)
    student = prepared.create_body(teacher_body, TEXTS, teacher_body.device)
    assert is_static(student)
    source = load_body(tiny_student) if "@" in name else teacher_body
    dimension = student.get_embedding_dimension() or 0
    assert name.startswith(f"static:{dimension}")
    np.testing.assert_array_equal(
        token_embeddings(student), token_embeddings(static_body(source, TEXTS, dimension=dimension))
    )


@pytest.mark.parametrize("name", ["static:8", "layers:x", "blank:x"])
def test_folder_takes_precedence_over_kind_with_same_name(
    name: str, tiny_student: Path, teacher_body: SentenceTransformer
) -> None:
    Path(name).symlink_to(tiny_student)
    student = create_body(name, teacher_body)
    assert equal_weights(list(student.state_dict().values()), list(load_body(tiny_student).state_dict().values()))


@pytest.mark.parametrize(
    ("name", "error", "fragment"),
    [
        *(
            (f"layers:{spec}", ConfigError, f"number of layers, got 'layers:{spec.partition('@')[0]}'")
            for spec in ("", "1,", "-1", "x@nobody/has-this")  # before a download
        ),
        ("layers", ConfigError, "number of layers, got 'layers:'"),
        ("layers:5", ModelError, "of a body with 4"),
        ("layers:1,1", ModelError, "of a body with 4"),
        ("layers:3@STUDENT", ModelError, "of a body with 2"),
        ("layers:2@STATIC", ModelError, "transformer"),
        ("layers:2@./nowhere", ModelError, "No such model folder: ./nowhere"),
        *(
            (f"static:{spec}", ConfigError, f"dimensions, at least 2, got 'static:{spec.partition('@')[0]}'")
            for spec in ("001", "123456", "8.5", "1@nobody/has-this")
        ),
        ("static", ModelError, "at most 32 dimensions, as the teacher has, got 128"),
        ("static:17@STUDENT", ModelError, "at most 16 dimensions, as the teacher has, got 17"),
        ("static:8@STATIC", ModelError, "transformer"),
    ],
)
def test_invalid_name_raises_error_before_training(
    name: str,
    error: type[SetFitKDError],
    fragment: str,
    teacher_body: SentenceTransformer,
    tiny_student: Path,
    static_folder: Path,
) -> None:
    name = name.replace("STUDENT", str(tiny_student)).replace("STATIC", str(static_folder))
    with pytest.raises(error, match=re.escape(fragment)) as raised:
        locate_student(name).prepare(teacher_body)
    assert raised.value.hint


def test_run_with_invalid_student_trains_and_writes_nothing(
    tiny_teacher: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "train_teacher", lambda *_, **__: pytest.fail("training has started"))
    with pytest.raises(SetFitKDError):
        small_run(tiny_teacher, [str(tiny_student), "static:33"], output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Token embeddings and static bodies


CLS, SEP = 2, 3


@pytest.mark.parametrize(("before", "after"), [((CLS,), (SEP,)), ((), ())])
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


def test_token_embeddings_do_not_depend_on_batch_size_padding_and_memory(
    student_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    expected, forward = embed_tokens(student_body), SentenceTransformer.forward

    def limited(body: Any, features: dict[str, Any], **kwargs: Any) -> Any:
        if len(features["input_ids"]) > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(body, features, **kwargs)

    get_tokenizer(student_body).enable_padding(length=16)
    for batch_size in (64, 100_000):
        np.testing.assert_allclose(embed_tokens(student_body, batch_size=batch_size), expected, atol=1e-6)
    assert get_tokenizer(student_body).padding is not None  # the tokenizer is unchanged
    monkeypatch.setattr(SentenceTransformer, "forward", limited)
    with shared_backoff() as events:
        np.testing.assert_allclose(embed_tokens(student_body), expected, atol=1e-6)
    assert events[-1]["to"]["texts"] == 128
    assert {event["phase"] for event in events} == {"Reading vocabulary"}


def single_token_words(body: SentenceTransformer) -> dict[str, int]:
    """Return the words that are a single token, with their token."""
    tokenizer = get_tokenizer(body)
    return {
        word: token
        for word, token in tokenizer.get_vocab().items()
        if word.isalpha() and tokenizer.encode(word, add_special_tokens=False).ids == [token]
    }


def test_embedding_of_text_is_mean_of_token_embeddings(teacher_body: SentenceTransformer) -> None:
    body = static_body(teacher_body, [], dimension=WIDTH)
    np.testing.assert_allclose(token_embeddings(body), embed_tokens(teacher_body), atol=1e-6)
    words = single_token_words(teacher_body)
    first, second = list(words)[:2]
    long_text = f"{f'{first} ' * 100}{f'{second} ' * 300}"  # is not truncated
    texts = [*(row["text"] for row in newswire("eval")[:50]), long_text, first]
    encoded = get_tokenizer(teacher_body).encode_batch(texts, add_special_tokens=False)
    for dimension in (2, WIDTH):
        body = static_body(teacher_body, TEXTS, dimension=dimension)
        expected = normalize_rows(np.stack([token_embeddings(body)[text.ids].mean(axis=0) for text in encoded[:-2]]))
        np.testing.assert_allclose(body.encode(texts[:-2], show_progress_bar=False), expected, atol=1e-6)
        [long] = body.encode([long_text], show_progress_bar=False)
        mean = (token_embeddings(body)[[words[first], words[second]]] * [[0.25], [0.75]]).sum(axis=0, keepdims=True)
        np.testing.assert_allclose(long[None], normalize_rows(mean), atol=1e-5)
        assert body.get_embedding_dimension() == dimension


def test_frequent_tokens_have_smaller_weights(teacher_body: SentenceTransformer) -> None:
    words = single_token_words(teacher_body)
    (frequent_word, frequent), (rare_word, rare) = list(words.items())[:2]
    texts = [f"{frequent_word} {frequent_word} {frequent_word} {rare_word}"] * 30
    before, after = (token_embeddings(static_body(teacher_body, counted, dimension=WIDTH)) for counted in ([], texts))
    share = np.zeros(len(before))
    share[[frequent, rare]] = 0.75, 0.25
    np.testing.assert_allclose(after, before * (1e-2 / (1e-2 + share))[:, None], rtol=1e-5)


def test_static_student_is_trained_with_frozen_embeddings(teacher_body: SentenceTransformer) -> None:
    """The setting does not apply to a body that has only embeddings."""
    signals = pool_signals()
    body = static_body(teacher_body, signals.texts, dimension=4)
    before = token_embeddings(body).copy()
    student = train_student(signals, body, **{**QUICK, "freeze_embeddings": True})
    assert np.abs(token_embeddings(student.model_body) - before).max() > 1e-3


@pytest.mark.parametrize(("setting", "trainer"), [("learning_rate", student), ("teacher_learning_rate", teacher)])
def test_default_learning_rate_depends_on_body(
    setting: str, trainer: Any, student_body: SentenceTransformer, teacher_body: SentenceTransformer
) -> None:
    match = re.search(r"default: (\S+); (\S+) for a static", RunConfig.model_fields[setting].description or "")
    assert match is not None
    for documented, body in zip(
        match.groups(), (student_body, static_body(teacher_body, [], dimension=8)), strict=True
    ):
        assert resolve_learning_rate(None, body, default=trainer.LEARNING_RATE) == float(documented)


# Several students in one run


SLUGS = ("student", "layers-2", "static-8")


def small_run(teacher: Path, students: Any, **settings: Any) -> RunResult:
    settings = {**FAST, "pool_size": 64, "cache": False, **settings}
    return distill(*["bundled:newswire"] * 3, teacher=str(teacher), student=students, **settings)


class SeveralStudents(NamedTuple):
    """A run of three students, with the names of the functions that it called."""

    names: list[str]
    folder: Path
    result: RunResult
    calls: list[str]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path) -> SeveralStudents:
    names = [str(tiny_student), "layers:2", "static:8"]
    folder = tmp_path_factory.mktemp("runs") / "run"
    calls: list[str] = []

    def record_calls(name: str) -> Any:
        function = getattr(stages, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs.get("description", name))
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("train_teacher", "refine_and_score", "train_student"):
            monkeypatch.setattr(stages, name, record_calls(name))
        result = small_run(tiny_teacher, names, output_dir=folder)
    return SeveralStudents(names, folder, result, calls)


def test_teacher_is_trained_once_and_each_student_has_its_folder_and_metrics(several: SeveralStudents) -> None:
    assert several.calls == ["train_teacher", "refine_and_score", *["train_student", "Training baseline"] * 3]
    assert {path.name for path in (several.folder / "students").iterdir()} == set(SLUGS)
    assert not (several.folder / "student").exists()
    metrics = read_json(several.folder / "metrics.json")
    rows = [row for slug in SLUGS for row in (f"baselines/{slug}", f"students/{slug}")]
    assert list(metrics) == ["teacher", *rows]
    assert metrics == several.result.metrics
    assert list(several.result.students) == several.names
    assert several.result.student is several.result.students[several.names[0]]
    saved_config = read_config(several.folder / "config.yaml")
    assert saved_config["student"] == several.names
    assert RunConfig.of(**saved_config) == several.result.config


def test_student_does_not_depend_on_other_students(several: SeveralStudents, tiny_teacher: Path) -> None:
    alone, together = small_run(tiny_teacher, several.names[2]).evaluations, several.result.evaluations
    names = {"teacher": "teacher", "student": f"students/{SLUGS[2]}", "baseline": f"baselines/{SLUGS[2]}"}
    for name, name_together in names.items():
        np.testing.assert_array_equal(alone[name].probabilities, together[name_together].probabilities)


def test_students_are_loaded_from_their_folders(several: SeveralStudents) -> None:
    assert_refused(
        invoke("predict", several.folder, "a text", "--device", "cpu"), f"{several.folder}/students/layers-2"
    )
    for slug in SLUGS:
        evaluation = evaluate(load(several.folder / "students" / slug, device="cpu"), "bundled:newswire")
        expected = several.result.evaluations[f"students/{slug}"]
        np.testing.assert_allclose(evaluation.probabilities, expected.probabilities, atol=1e-6)


def test_single_student_is_a_string_in_config_and_has_folder_student(
    several: SeveralStudents, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(several.folder, tmp_path / "run")
    result = small_run(tiny_teacher, ["layers:2"], output_dir=folder, overwrite=True)
    saved_config = read_config(folder / "config.yaml")
    assert saved_config["student"] == "layers:2"
    assert RunConfig.of(**saved_config) == result.config
    assert (folder / "student").is_dir()
    assert not (folder / "students").exists()
    assert list(result.evaluations) == ["teacher", "baseline", "student"]


@pytest.mark.parametrize("names", [[], ["layers:2", "static:8", "layers:2"], ["layers:2", " "], ["a\0b"], [3]])
def test_invalid_student_names_raise_error(names: list[Any]) -> None:
    with pytest.raises(ConfigError, match="student"):
        RunConfig.of(student=names)


MODEL_NAMES = st.builds(
    "{}{}".format,
    st.sampled_from(["", "static@", "static:8@", "layers:3@", "layers:0,2@", "demo:", "org/", "/models/", "../"]),
    st.text(st.sampled_from("abA-_./@:, é中\\"), min_size=1, max_size=12),
)


@given(st.lists(MODEL_NAMES, min_size=1, max_size=8, unique=True))
def test_folder_names_are_distinct_and_valid(names: list[str]) -> None:
    assume(all(name.strip() for name in names))
    slugs = folder_names(names)
    assert len(slugs) == len({slug.casefold() for slug in slugs}) == len(names)  # some file systems ignore case
    for slug in slugs:
        assert re.fullmatch(r"[\w][\w.-]*", slug)
        assert Path(slug).name == slug


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["org/all-MiniLM-L6-v2", "demo:all-MiniLM-L12"], ["all-MiniLM-L6-v2", "all-MiniLM-L12"]),
        (["layers:0,2,5", "static", "layers:3@folder/"], ["layers-0-2-5", "static", "layers-3-folder"]),
        (["transformer:org/b", "b", "static:64@transformer:b"], ["transformer-b", "b", "static-64-transformer-b"]),
        (["blank:configs/small"], ["blank-small"]),
        (["one/same", "two/same", "same-2", "SAME"], ["same", "same-2", "same-2-2", "SAME-3"]),
        (["/a/b/", ".."], ["b", "student"]),
    ],
)
def test_folder_name_is_derived_from_model_name(names: list[str], expected: list[str]) -> None:
    assert folder_names(names) == expected
