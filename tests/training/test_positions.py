"""Positions of an answer's ids: by line, by path, by name in the question."""

from tokenizers import Encoding
from training_cases import small_corpus

from training.positions import line_sources, path_sources, repeated


def encoded(text: str) -> Encoding:
    return small_corpus().tokenizer.encode(text, add_special_tokens=False)


def test_a_line_is_found_behind_its_first_id_and_with_it_on_request() -> None:
    ids = [9, 9, 5, 6, 7, 8, 9]
    assert line_sources([4, 6, 7], ids, 1, 7) == [-1, 3, 4]
    assert line_sources([5, 6, 7], ids, 1, 7, True) == [2, 3, 4]
    assert line_sources([5, 6, 7], ids, 1, 7) == [-1, 3, 4]
    assert line_sources([1, 2, 3], ids, 1, 7) == [-1, -1, -1]


def test_a_path_is_found_in_its_header_although_its_first_id_differs() -> None:
    assert path_sources([1, 20, 11, 12, 3], [10, 11, 12], [0, 0, 10, 11, 12, 5], 1) == [-1, 2, 3, 4, -1]


def test_a_name_is_repeated_from_the_question_piece_by_piece() -> None:
    question, answer = "What is the value of `QUORUM_ZEBRA_17`, please?", "QUORUM_ZEBRA_17 is not in these files."
    name = "QUORUM_ZEBRA_17"
    one, two = encoded(answer), encoded(question)
    found = repeated(one, 0, two, question.index(name), len(name))
    assert sorted(found) == list(range(len(found))) and len(found) >= 5
    assert one.offsets[max(found)][1] == len(name)
    for i, j in found.items():
        first, stop = two.offsets[j]
        assert first < one.offsets[i][1] + question.index(name) <= stop


def test_a_piece_that_is_cut_otherwise_is_repeated_from_the_id_that_ends_it() -> None:
    answer, question = "VARS is not in these files.", "Where is VARS?"
    one, two = encoded(answer), encoded(question)
    for i, j in repeated(one, 0, two, 9, 4).items():
        assert answer[one.offsets[i][1] - 1] in question[slice(*two.offsets[j])]
