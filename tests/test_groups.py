"""Classes and clusters: what is decided, what is refused, and the two verbs as people call them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gircse.errors import UsageError
from gircse.explanation import mean_soft_token
from gircse.groups.classify import Classifier
from gircse.groups.clusters import closeness, cluster, distinctive_words, most_central, spoken_words
from gircse.model import GIRCSE
from tests.verbs import run

WORDS = {"joy": 0, "happy": 0, "glad": 0, "anger": 1, "angry": 1, "fear": 2, "afraid": 2}


class WordModel:
    """A text's vector counts its words of each mood; under another instruction all texts are the same."""

    def __init__(self) -> None:
        self.steps: list[int | None] = []

    def format_instruction(self, instruction: str) -> str:
        return f"{instruction}: "

    def encode(
        self, texts: list[str], *, prompt: str, num_steps: int | None, normalize_embeddings: bool, **_: Any
    ) -> np.ndarray:
        assert normalize_embeddings
        self.steps.append(num_steps)
        vectors = np.full((len(texts), 3), 0.1, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split() if "mood" in prompt else ():
                if word in WORDS:
                    vectors[row, WORDS[word]] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def word_model() -> GIRCSE:
    return cast(GIRCSE, WordModel())


def test_a_text_goes_to_the_nearest_name() -> None:
    moods = Classifier.from_labels(word_model(), ["joy", "anger", "afraid_of_it"], instruction="mood")
    texts = ["i am glad", "angry men and an angry mob", "afraid", "nothing"]
    assigned = moods(texts)
    assert [own.label for own in assigned[:3]] == ["joy", "anger", "afraid_of_it"], "an underscore is read as a space"
    assert all(own.score > 0.9 and own.margin > 0.5 for own in assigned[:3])
    assert assigned[3].margin == pytest.approx(0, abs=1e-6)
    alone = moods(texts[1:2])[0]
    assert (alone.label, alone.score) == (assigned[1].label, pytest.approx(assigned[1].score)), "whoever is beside it"
    assert moods([]) == []
    scores = moods.scores(texts)
    assert scores.shape == (4, 3)
    assert scores[0].max() == pytest.approx(assigned[0].score)


def test_a_text_goes_to_the_class_of_examples_like_it() -> None:
    shown = ["glad", "happy", "happy and glad", "angry", "so angry", "very angry"]
    moods = Classifier.from_examples(word_model(), shown, ["+"] * 3 + ["-"] * 3, instruction="mood")
    glad, angry = moods(["a happy man", "an angry man"])
    assert (glad.label, angry.label) == ("+", "-")
    assert glad.score > 0.8
    assert glad.margin == pytest.approx(2 * glad.score - 1), "of two classes the runner-up has the rest"
    numbers = Classifier.from_examples(word_model(), shown, [str(n // 2) for n in range(6)], instruction="mood")
    assert numbers.labels == ["0", "1", "2"]
    np.testing.assert_allclose(numbers.scores(shown).sum(axis=1), 1, rtol=1e-6)


def test_instruction_and_steps_reach_the_model() -> None:
    model = word_model()
    blind = Classifier.from_labels(model, ["joy", "anger"], num_steps=7)(["glad"])
    assert blind[0].margin < 1e-6
    assert cast(WordModel, model).steps == [7, 7]


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([], "not 0"),
        (["joy"], "not 1"),
        (["joy", " "], "no name"),
        (["joy", "fear", "joy"], "'joy' is named twice"),
    ],
)
def test_names_that_make_no_choice_are_refused(labels: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Classifier.from_labels(word_model(), labels)


def test_examples_that_make_no_choice_are_refused() -> None:
    with pytest.raises(UsageError, match="not 1"):
        Classifier.from_examples(word_model(), ["a", "b"], ["joy", "joy"])
    with pytest.raises(UsageError, match="2 examples have 1 labels"):
        Classifier.from_examples(word_model(), ["a", "b"], ["joy"])


def test_clusters_are_the_groups_with_their_words_and_centres() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], [30, 20, 10])
    vectors = np.eye(8, dtype=np.float32)[groups] + 0.1 * generator.standard_normal((60, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = cluster(vectors, 3)
    np.testing.assert_array_equal(found, groups)  # numbered by size
    near = closeness(vectors, found)
    centre = vectors[:30].mean(axis=0)
    np.testing.assert_allclose(near[:30], vectors[:30] @ centre / np.linalg.norm(centre), rtol=1e-5)
    central = most_central(near, found, 4)
    assert [rows.tolist() for rows in central] == [
        sorted(np.flatnonzero(groups == place).tolist(), key=lambda row: -near[row])[:4] for place in range(3)
    ]
    words = distinctive_words([f"the {('cat', 'dog', 'cow')[g]} of {n}" for n, g in enumerate(groups)], found)
    assert [own[0] for own in words] == ["cat", "dog", "cow"]


def test_texts_that_are_all_alike_are_one_cluster() -> None:
    vectors = np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (5, 1))
    found = cluster(vectors, 3)
    assert found.tolist() == [0] * 5
    np.testing.assert_allclose(closeness(vectors, found), 1, rtol=1e-6)


def test_the_mean_soft_token_is_that_of_the_texts(saved: str) -> None:
    model = GIRCSE(saved, device="cpu")
    texts = ["a cat", "some dogs bark", "c"]
    mean = mean_soft_token(model, texts, "about: ", batch_size=2)
    assert mean.sum() == pytest.approx(1, abs=1e-5)
    alone = [mean_soft_token(model, [text], "about: ") for text in texts]
    np.testing.assert_allclose(mean, np.mean(alone, axis=0), atol=1e-6)
    first = model.explain(texts[0], prompt="about: ", num_steps=1, top=1)[0]
    assert alone[0].max() == pytest.approx(first.weights[0], abs=1e-6)
    assert model.tokenizer.decode([int(alone[0].argmax())]) == first.tokens[0]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [{"key": f"k{n}", "text": f"{'cat' if n % 2 else 'dog'} {n}", "label": n % 2} for n in range(12)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.txt").write_text("a cat\na dog\na cow\n")
    (tmp_path / "names.txt").write_text("cat\n\n dog \n")
    return tmp_path


def test_classify_by_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: Path, saved: str
) -> None:
    usual = ["--model", saved, "--dtype", "float32", "--json"]
    asked = ["classify", files / "texts.jsonl", "--labels", "cat, dog", "--truth", "label", *usual]
    answers = []
    for options in ([], ["--num-steps", "0"], ["--instruction", "x"], ["--labels", files / "names.txt"]):
        code, out, _ = run(monkeypatch, capsys, *asked, *options)
        assert code == 0
        answers.append(json.loads(out))
    assert [row["id"] for row in answers[0]["results"]] == list(range(1, 13))
    scores = [[row["score"] for row in answer["results"]] for answer in answers]
    assert scores[0] != scores[1], "K changes the result"
    assert scores[0] != scores[2], "so does the instruction"
    assert scores[0] == scores[3], "and where the names come from does not"
    model = GIRCSE(saved, device="cpu")
    expected = Classifier.from_labels(model, ["cat", "dog"])([row["text"] for row in answers[0]["results"]])
    assert [row["label"] for row in answers[0]["results"]] == [own.label for own in expected]
    np.testing.assert_allclose(scores[0], [own.score for own in expected], atol=1e-5)
    assert answers[0]["accuracy"] == 0, "0 and 1 are no names"
    assert sum(answers[0]["classes"].values()) == 12


def test_classify_by_examples_into_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: Path, saved: str
) -> None:
    source, output = files / "texts.jsonl", files / "sorted.csv"
    asked = ["classify", source, "--examples", source, "--truth", "label", "--id-column", "key", "--model", saved]
    code, out, err = run(monkeypatch, capsys, *asked, "-o", output)
    assert code == 0
    assert "12 rows" in err
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["text"]) for row in rows[:2]] == [("k0", "dog 0"), ("k1", "cat 1")]
    right = sum(row["label"] == str(number % 2) for number, row in enumerate(rows))
    assert right > 6, "it has seen them all"
    assert f"accuracy {right / 12:.3f} of 12" in out
    code, _, err = run(monkeypatch, capsys, *asked, "-o", output)
    assert code == 2
    assert "--overwrite" in err
    assert run(monkeypatch, capsys, *asked, "-o", output, "--overwrite")[0] == 0
    assert not list(files.glob("*.partial"))


def test_cluster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: Path, saved: str) -> None:
    asked = ["cluster", files / "texts.jsonl", "-k", "2", "--truth", "label", "--model", saved, "--dtype", "float32"]
    code, out, _ = run(monkeypatch, capsys, *asked, "--json")
    assert code == 0
    facts = json.loads(out)
    assert [group["size"] for group in facts["clusters"]] == sorted(
        (sum(row["cluster"] == n for row in facts["results"]) for n in (1, 2)), reverse=True
    )
    assert 0 <= facts["v_measure"] <= 1
    other = json.loads(run(monkeypatch, capsys, *asked, "--json", "--instruction", "y")[1])
    assert [row["similarity"] for row in other["results"]] != [row["similarity"] for row in facts["results"]]
    output = files / "groups.jsonl"
    code, out, _ = run(monkeypatch, capsys, *asked, "-o", output)
    assert code == 0
    assert "v-measure" in out
    assert [json.loads(line) for line in output.read_text().splitlines()] == facts["results"]


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["classify", "texts.txt"], 2, "either --labels"),
        (["classify", "texts.txt", "--labels", "a,b", "--examples", "texts.jsonl"], 2, "either --labels"),
        (["classify", "texts.txt", "--labels", "a"], 2, "two classes or more, not 1"),
        (["classify", "texts.txt", "--labels", "missing.txt"], 1, "missing.txt"),
        (["classify", "texts.txt", "--labels", "a,b", "--truth", "label"], 2, "plain text"),
        (["classify", "texts.txt", "--labels", "a,b", "--label-column", "team"], 2, "--truth"),
        (["classify", "texts.txt", "--labels", "a,b", "--overwrite"], 2, "-o"),
        (["classify", "texts.txt", "--labels", "a,b", "-o", "nowhere/out.csv"], 2, "no folder nowhere"),
        (["classify", "texts.txt", "--labels", "a,b", "-o", "out.parquet"], 2, ".jsonl or .csv"),
        (["classify", "texts.jsonl", "--examples", "texts.jsonl", "--label-column", "team"], 1, "'team' is missing"),
        (["cluster", "texts.txt", "-k", "4"], 1, "3 texts make no 4 groups"),
        (["cluster", "texts.txt", "-k", "1"], 2, "--clusters"),
        (["cluster", "nowhere.txt"], 1, "nowhere.txt"),
    ],
)
def test_wrong_calls(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: Path,
    arguments: list[str],
    code: int,
    problem: str,
) -> None:
    monkeypatch.chdir(files)
    found, out, err = run(monkeypatch, capsys, *arguments)
    assert (found, out) == (code, "")
    assert problem in err.replace("\n", " ")


@pytest.mark.real_model
@pytest.mark.slow
def test_the_shipped_model_sorts_and_names() -> None:
    model = GIRCSE(device="cpu")
    texts = {
        "fear": ["I am scared of the dark.", "The noise at night terrified her.", "He was afraid that he would fall."],
        "joy": ["What a wonderful day, I am so happy!", "They laughed and danced.", "She was delighted by the gift."],
        "anger": ["I am furious about this bill.", "He shouted at them in rage.", "How dare you treat me like that!"],
    }
    flat = [text for own in texts.values() for text in own]
    truth = [label for label, own in texts.items() for _ in own]
    moods = Classifier.from_labels(model, list(texts), instruction="Identify the emotion")
    right = sum(own.label == label for own, label in zip(moods(flat), truth, strict=True))
    assert right >= 8
    prompt = model.format_instruction("Identify the emotion")
    groups = [np.arange(3), np.arange(3, 6), np.arange(6, 9)]
    said = spoken_words(model, flat, groups, prompt)
    assert "fear" in said[0]
    assert {"joy", "excitement", "gratitude", "admiration"} & set(said[1])
    assert {"anger", "annoyance", "disapproval"} & set(said[2])
