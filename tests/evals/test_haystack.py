"""Haystacks: how much they hold, where planted lines stand, and that packs begin alike up to a planted line."""

import random
from pathlib import Path

import pytest
import tiny_model
import tiny_tokenizer

from salalocal.errors import RequestError
from salalocal.evals.haystack import (
    ANSWER_TOKENS,
    Haystack,
    Planted,
    Stack,
    ask_about,
    document_budget,
    largest,
    made_document,
)
from salalocal.session.start import Sources
from salalocal.session.tokens import TextCodec


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.write_tokenizer(folder)
    return TextCodec.from_folder(folder)


def haystack(codec: TextCodec, num_documents: int = 7) -> Haystack:
    texts = ["".join(f"line {i} of document {number}\n" for i in range(9 + number)) for number in range(num_documents)]
    return Haystack("made", [tiny_model.document(f"d{i}.txt", text) for i, text in enumerate(texts)], codec)


def prompt_tokens(codec: TextCodec, stack: Stack, lines: list[Planted], question: str) -> int:
    return codec.report(stack.plant(lines)).total_tokens + len(codec.tokenizer.encode(question))


def test_a_stack_fills_its_budget_and_never_more(codec: TextCodec, seed: int) -> None:
    hay, rng = haystack(codec), random.Random(seed)
    for _ in range(20):
        budget = rng.randint(200, 9000)
        stack = hay.stack(budget, rng)
        rendered = sum(count for _, count in codec.template.count_document_tokens(stack.plant(())))
        assert rendered <= stack.num_tokens <= budget
        assert budget - stack.num_tokens < 100  # one more line would not have fitted
        paths = [document.path for document in stack.documents]
        assert len(set(paths)) == len(paths)
    with pytest.raises(RequestError, match="too few"):
        hay.stack(5, rng)


def test_a_context_holds_documents_question_and_answer(codec: TextCodec, seed: int) -> None:
    question = "What is the value of LUCKY_LIZARD_PEBBLE?"
    stack = haystack(codec).stack(document_budget(2000, question, codec), random.Random(seed))
    conversation = ask_about(stack.plant(()), question)
    segments = codec.template.render(conversation)
    assert 1700 < sum(len(segment.ids) for segment in segments) + ANSWER_TOKENS <= 2000


def test_equal_seeds_stack_equally(codec: TextCodec, seed: int) -> None:
    packs = [haystack(codec).stack(1500, random.Random(part)).plant(()) for part in (seed, seed, seed + 1)]
    assert packs[0] == packs[1] != packs[2]


def test_lines_stand_at_their_depth(codec: TextCodec, seed: int) -> None:
    stack = haystack(codec).stack(4000, random.Random(seed))
    for depth in (0.0, 0.13, 0.5, 0.77, 1.0):
        pack = stack.plant([Planted(depth, "NEEDLE = 1")])
        text = "".join(document.text for document in pack)
        before = text.index("NEEDLE = 1\n") / (len(text) - len("NEEDLE = 1\n"))
        assert before == pytest.approx(depth, abs=0.05)
        assert text.replace("NEEDLE = 1\n", "") == "".join(document.text for document in stack.documents)
    assert stack.plant([Planted(0.0, "X")]).documents[0].text.startswith("X\n")
    assert stack.plant([Planted(1.0, "X")]).documents[-1].text.endswith("\nX\n")


def test_many_lines_are_all_planted_in_order(codec: TextCodec, seed: int) -> None:
    rng = random.Random(seed)
    stack = haystack(codec, 2).stack(10**3, rng)
    depths = sorted(rng.random() for _ in range(40))
    shuffled = rng.sample(list(enumerate(depths)), len(depths))
    text = "".join(document.text for document in stack.plant([Planted(d, f"N{i}") for i, d in shuffled]))
    found = [line for line in text.splitlines() if line.startswith("N")]
    assert found == [f"N{i}" for i in range(40)]


def test_packs_begin_alike_up_to_the_document_of_the_line(codec: TextCodec, seed: int) -> None:
    stack = haystack(codec).stack(4000, random.Random(seed))
    plain, planted = stack.plant(()), stack.plant([Planted(0.6, "X = 1")])
    changed = [one != other for one, other in zip(plain.documents, planted.documents, strict=True)]
    assert sum(changed) == 1 and changed.index(True) > 0


def test_a_text_without_a_last_newline_gets_one(codec: TextCodec) -> None:
    stack = Stack((made_document("a", "one\ntwo"),), (10,))
    assert stack.plant([Planted(1.0, "X")]).documents[0].text == "one\ntwo\nX\n"
    assert "two" in stack and "three" not in stack


def test_files_make_a_haystack(codec: TextCodec, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha\n" * 30)
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    told: list[str] = []
    hay = Haystack.of_files(Sources((str(tmp_path),), "path"), codec, told.append)
    assert [document.path for document in hay.documents] == ["a.txt"] and hay.name == "1 file"
    assert any("b.bin" in line for line in told)
    shipped = Haystack.shipped(codec)
    assert len(shipped.documents) > 150 and len({document.path for document in shipped.documents}) == len(
        shipped.documents
    )


def test_largest_is_the_last_that_fits() -> None:
    for limit in range(9):
        assert largest(7, lambda n, limit=limit: n <= limit) == min(limit, 7)  # type: ignore[misc]


def test_distinct_documents_repeat_none(codec: TextCodec, seed: int) -> None:
    hay = haystack(codec)
    whole = {document.text for document in hay.documents}
    stack = hay.stack(3 * hay.num_tokens + 100, random.Random(seed))
    assert len(stack.documents) > 14 and {document.text for document in stack.distinct} == whole
    assert len(stack.distinct) == 7
    short = hay.stack(hay.num_tokens // 2, random.Random(seed))
    assert tuple(short.distinct) == short.documents
