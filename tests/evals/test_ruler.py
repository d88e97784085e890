"""RULER's families: each question can be answered from its documents, by a reader that does what is asked."""

import re
from collections import Counter

import pytest
import tiny_model
import tiny_tokenizer

from salalocal.errors import RequestError
from salalocal.evals.asking import Question
from salalocal.evals.haystack import Haystack
from salalocal.evals.ruler import TASKS, RulerRequest, ruler_cases
from salalocal.session.tokens import TextCodec

LENGTH = 6000
NEEDLE = re.compile(r"One of the special magic numbers for (.+) is: (\d+)\.")


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.write_tokenizer(folder)
    return TextCodec.from_folder(folder)


def questions(codec: TextCodec, task: str, seed: int, samples: int = 3) -> list[tuple[str, Question]]:
    """The text and the question of some cases; every one fits its context."""
    documents = [
        tiny_model.document(f"d{i}.py", f"LIMIT_{i}{i} = {i}5\n" + "# the value of data\n" * 9) for i in range(9)
    ]
    request = RulerRequest((LENGTH,), (task,), samples, seed)
    made = []
    for case in ruler_cases(request, Haystack("made", documents, codec), codec):
        question = case.make()
        segments = codec.template.render(question.conversation)
        assert 0.75 * LENGTH < sum(len(segment.ids) for segment in segments) <= LENGTH - 128
        assert question.conversation.pack is not None
        made.append(("".join(document.text for document in question.conversation.pack), question))
    return made


def asked(question: Question) -> str:
    return question.conversation.turns[-1].question


@pytest.mark.parametrize(
    ("task", "num_needles", "num_expected"),
    [("single", 1, 1), ("multi-key", 4, 1), ("multi-value", 4, 4), ("multi-query", 4, 4), ("all-keys", None, 1)],
)
def test_needles(codec: TextCodec, task: str, num_needles: int | None, num_expected: int, seed: int) -> None:
    for text, question in questions(codec, task, seed):
        pairs = NEEDLE.findall(text)
        assert len(pairs) == num_needles or (num_needles is None and len(pairs) > 30)
        if num_needles is None:
            assert len(text.splitlines()) == len(pairs) == len({name for name, _ in pairs})
        found = [value for name, value in pairs if name in asked(question)]
        assert sorted(found) == sorted(question.expected) and len(found) == num_expected
        assert question.mark(" ".join(found)).is_right
        assert question.mark(found[0]).score == pytest.approx(1 / num_expected)


def test_variable_tracing(codec: TextCodec, seed: int) -> None:
    for text, question in questions(codec, "variable-tracing", seed):
        values: dict[str, str] = {}
        for name, source in re.findall(r"^(VAR_\w+) = (\w+)$", text, re.MULTILINE):
            values[name] = values.get(source, source)  # in reading order, as a program would run
        (wanted,) = re.findall(r"\d{7}", asked(question))
        assert len(values) == 10 and sorted(n for n, v in values.items() if v == wanted) == sorted(question.expected)
        assert len(question.expected) == 5


def test_words_are_counted(codec: TextCodec, seed: int) -> None:
    for text, question in questions(codec, "common-words", seed):
        counts = Counter(re.findall(r"\d+\. (\w+)", text))
        assert [count for _, count in counts.most_common(11)] == [30] * 10 + [3]
        assert {word for word, _ in counts.most_common(10)} == set(question.expected)
    for text, question in questions(codec, "frequent-words", seed):
        counts = Counter(text.split())
        (_, first), (_, second), (_, third), (_, fourth) = counts.most_common(4)
        assert first > second > third > fourth and {word for word, _ in counts.most_common(3)} == set(question.expected)
        assert first / second == pytest.approx(4, rel=0.1)


def test_files_are_asked_about(codec: TextCodec, seed: int) -> None:
    for text, question in questions(codec, "files", seed):
        (name,) = re.findall(r"LIMIT_\d+", asked(question))
        assert set(re.findall(rf"^{name} = (\d+)$", text, re.MULTILINE)) == set(question.expected)


def test_equal_seeds_ask_equally(codec: TextCodec, seed: int) -> None:
    for task in TASKS:
        made = [[(text, asked(q)) for text, q in questions(codec, task, s, 1)] for s in (seed, seed, seed + 1)]
        assert made[0] == made[1] != made[2], task


def test_what_cannot_be_asked_is_refused() -> None:
    for values, said in (({"tasks": ("nothing",)}, "nothing"), ({"samples": 0}, "--samples")):
        with pytest.raises(RequestError, match=said):
            RulerRequest((4096,), **values)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="--ctx 4095"):
        RulerRequest((4095,))
