"""From picked blocks to lines: the scores, the places of lines, and a planted fact that an answer is read from."""

import math
import random

import pytest
import torch
from tiny_model import document

from salalocal.engine.picks import AnswerPicks, Picks
from salalocal.errors import RequestError
from salalocal.evals.haystack import Haystack, Planted
from salalocal.kernels.block_topk import BlockGeometry
from salalocal.prompt.pack import PromptPack
from salalocal.prompt.template import Conversation, Turn, document_text
from salalocal.session.attribution import (
    NEUTRAL_QUESTIONS,
    NEUTRAL_TOKENS,
    DocumentPlaces,
    block_scores,
    find_sources,
    ids_behind_documents,
)
from salalocal.session.runtime import Runtime, load

GEOMETRY = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=6)


@pytest.fixture(scope="module")
def builtin() -> Runtime:
    return load("builtin")


def picks(rows: list[list[dict[int, float]]], position: int) -> Picks:
    """Rows at one position and behind it; of one layer, by head the blocks with their scores, and the forced ones."""
    own = position // 16
    forced = dict.fromkeys((0, own - 2, own - 1, own), 0.0)
    full = [[sorted({**forced, **head}.items()) for head in row] for row in rows]
    blocks = torch.tensor([[[block for block, _ in head] for head in row] for row in full], dtype=torch.int32)
    weights = torch.tensor([[[score for _, score in head] for head in row] for row in full]).log2()
    return Picks(blocks[:, None], weights[:, None], position + torch.arange(len(rows)))


def even(*blocks: int) -> dict[int, float]:
    return dict.fromkeys(blocks, 3.0)


def test_what_every_question_picks_counts_less() -> None:
    answer = picks([[even(3, 7), even(3, 4)], [even(3, 7), even(3, 5)]], 320)
    usual = picks([[even(3, 9), even(3, 9)]] * 8, 336)
    scores = block_scores(answer, usual, GEOMETRY)
    assert scores.argmax() == 7 and scores[7] > scores[4] == scores[5] > scores[3] > 0
    assert scores[[0, 18, 19, 20]].eq(0).all() and scores[9] == 0
    # Half of one head's weight, against none of eight rows that had 17 blocks to pick from.
    torch.testing.assert_close(scores[7], 0.5 * torch.log(torch.tensor(0.5 * 9 * 17, dtype=torch.float64)))


def test_a_block_counts_by_its_score_and_scores_do_not_overflow() -> None:
    answer = picks([[{3: 8.0, 7: 1.0}, even(4, 5)]], 320)
    scores = block_scores(answer, Picks.last(answer, 0), GEOMETRY)
    assert scores[3] > scores[4] == scores[5] > scores[7] > 0
    far = Picks(answer.blocks, answer.weights + 5000, answer.positions)
    torch.testing.assert_close(block_scores(far, Picks.last(answer, 0), GEOMETRY), scores)


def test_scores_are_those_of_the_formula(seed: int) -> None:
    chance = random.Random(seed)

    def draw(count: int, position: int) -> Picks:
        def head() -> dict[int, float]:
            return {block: chance.random() for block in chance.sample(range(1, position // 16 - 2), 5)}

        return picks([[head() for _ in range(3)] for _ in range(count)], position)

    def mean_weight(side: Picks, head: int, block: int) -> tuple[float, int]:
        """Over the rows that might have picked the block."""
        found = []
        for blocks, logs, position in zip(side.blocks, side.weights, side.positions.tolist(), strict=True):
            free = [1 <= x < position // 16 - 2 for x in blocks[0, head].tolist()]
            scores = (2 ** logs[0, head].double()) * torch.tensor(free)
            if block < position // 16 - 2:
                found.append(float(scores[blocks[0, head] == block].sum() / scores.sum()))
        return sum(found) / max(1, len(found)), len(found)

    answer, usual = draw(6, 304), draw(4, 330)
    scores = block_scores(answer, usual, GEOMETRY)
    for block in range(1, 17):
        expected = 0.0
        for head in range(3):
            p, _ = mean_weight(answer, head, block)
            q, count = mean_weight(usual, head, block)
            q = (count * q + 1 / 16) / (count + 1)
            expected += p * math.log(p / q) if p > q else 0.0
        assert abs(float(scores[block]) - expected) < 1e-6, block


def lines_of_bytes(text: str, first: int, end: int) -> set[int]:
    """The lines of a document that have a character among some bytes of it as it stands in a prompt."""
    whole = document_text(1, document("d.txt", text)).encode()
    begin = whole.index(b"<document_content>\n") + len(b"<document_content>\n")
    line, found = 1, set()
    for at in range(begin, begin + len(text.encode())):
        if whole[at : at + 1] == b"\n":
            line += 1
        elif first <= at < end:
            found.add(line)
    return found


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_parts_have_the_lines_of_their_bytes(builtin: Runtime, block_size: int, seed: int) -> None:
    chance = random.Random(seed)
    pieces = ("\n", "x = 1\n", "naïve 中\n", "\n\n", "word ", "<document>")
    texts = ["no end", *("".join(chance.choices(pieces, k=chance.randint(0, 50))) for _ in range(4))]
    for text in texts:
        pack = PromptPack((document("d.txt", text),))
        segments = builtin.codec.template.render(Conversation(None, pack))
        places, start = DocumentPlaces(segments, pack, builtin.tokenizer), len(segments[0].ids) + len(segments[1].ids)
        sizes = [len(builtin.tokenizer.piece_bytes(i)) for i in segments[2].ids]
        rows, num_tokens = text.removesuffix("\n").split("\n"), 0
        for block in range((start + len(sizes)) // block_size + 1):
            for part in places.parts(block, block_size):
                assert block * block_size <= part.first_token < part.end_token <= (block + 1) * block_size
                num_tokens += part.num_tokens
                begin, end = (sum(sizes[: token - start]) for token in (part.first_token, part.end_token))
                expected, lines = lines_of_bytes(text, begin, end), places.lines([part])
                assert lines is not None or not expected
                if lines is not None:
                    assert 1 <= lines[0] <= lines[1] <= len(rows)
                    named = set(range(lines[0], lines[1] + 1))
                    assert named >= expected and not any(rows[line - 1] for line in named - expected)
        assert num_tokens == len(sizes)


def test_touching_blocks_are_one_source_and_the_limit_counts_blocks(builtin: Runtime) -> None:
    pack = PromptPack((document("a.txt", "".join(f"line {i} is here\n" for i in range(400))),))
    segments = builtin.codec.template.render(Conversation(None, pack))
    places = DocumentPlaces(segments, pack, builtin.tokenizer)
    answer = AnswerPicks(picks([[even(3, 4, 9)]] * 3, 640), 5, 1)
    usual = picks([[even(1, 2, 9)]] * 4, 650)
    found = find_sources(answer, usual, GEOMETRY, places, 2)
    assert len(found.sources) == 1 and found.sources[0].path == "a.txt" and 0.5 < found.sources[0].share < 1
    assert (found.num_tokens, found.num_dense, found.num_known, found.num_first, found.num_last) == (5, 1, 3, 16, 32)
    both = find_sources(answer, usual, GEOMETRY, places, 9)
    assert len(both.sources) == 2 and abs(sum(source.share for source in both.sources) - 1) < 1e-9
    none = find_sources(AnswerPicks(answer.picks.last(0), 5, 5), usual, GEOMETRY, places, 9)
    assert none.sources == () and none.num_known == 0


def test_neutral_questions_fit_into_their_room(builtin: Runtime) -> None:
    pack = PromptPack((document("a.txt", "x"),))
    for question in NEUTRAL_QUESTIONS:
        segments = builtin.codec.template.render(Conversation("system", pack, (Turn(question),)))
        ids = ids_behind_documents(segments)
        assert 0 < len(ids) <= NEUTRAL_TOKENS and question in builtin.tokenizer.decode(ids)
        assert builtin.tokenizer.decode(ids).startswith("</documents>")


def archive(runtime: Runtime, seed: int) -> tuple[PromptPack, dict[str, tuple[str, int]]]:
    """Some 8,400 tokens of the shipped texts with three lines planted: by name, file and line."""
    chance = random.Random(seed)

    def word() -> str:
        return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=6))

    lines = {f"{word()}_{word()}": f"{chance.randint(1000, 9999)}" for _ in range(3)}
    planted = [Planted(0.2 + 0.3 * place, f"{name} = {value}") for place, (name, value) in enumerate(lines.items())]
    pack = Haystack.shipped(runtime.codec).stack(8400, chance).plant(planted)
    facts = {}
    for name, value in lines.items():
        (entry,) = (entry for entry in pack if name in entry.text)
        facts[name] = (entry.path, entry.text.splitlines().index(f"{name} = {value}") + 1)
    return pack, facts


def test_planted_lines_are_named(builtin: Runtime, seed: int) -> None:
    pack, facts = archive(builtin, seed)
    session = builtin.session(pack=pack)
    with pytest.raises(RequestError):
        session.sources()
    num_named = 0
    for name, (path, line) in facts.items():
        list(session.ask(f"What is the value of {name}?"))
        found = session.sources(3)
        session.undo()
        assert found.num_dense == 0 and found.num_known == found.num_tokens > 0
        shares = [source.share for source in found.sources]
        assert 0 < sum(shares) <= 1 and shares == sorted(shares, reverse=True)
        num_named += any(
            source.path == path and source.first_line <= line <= source.last_line for source in found.sources
        )
    assert session.token_report().total_tokens >= 8192
    assert num_named >= 2, "of 120 blocks three are named"
