"""Where the ids of an answer stand in the documents and in the question.

In: ids, encodings and where lines begin. Out: per id of the answer the position of the id that it repeats, or -1. For:
training/transcript.py.
"""

from tokenizers import Encoding


def line_sources(answer: list[int], ids: list[int], start: int, end: int, has_first: bool = False) -> list[int]:
    """The position between start and end each answer id is copied from, or -1; for the first id only on request."""
    window, tail = ids[start:end], answer[1:]
    for length in range(len(tail), 0, -1):
        for offset in range(len(window) - length + 1):
            if window[offset : offset + length] == tail[:length]:
                is_first = has_first and offset > 0 and window[offset - 1] == answer[0]
                first = start + offset - 1 if is_first else -1
                return [first, *range(start + offset, start + offset + length), *[-1] * (len(tail) - length)]
        if length < len(tail) - 1:
            break
    return [-1] * len(answer)


def path_sources(answer: list[int], path: list[int], ids: list[int], start: int) -> list[int]:
    """Positions, in its document's header, of the path's ids inside the answer."""
    found = [-1] * len(answer)
    for at in range(len(answer) - len(path) + 1):
        if answer[at + 1 : at + len(path)] == path[1:]:
            header = ids[start : start + len(path) + 8]
            for offset in range(len(header) - len(path) + 1):
                if header[offset + 1 : offset + len(path)] == path[1:]:
                    for i in range(len(path)):
                        found[at + i] = start + offset + i
                    return found
    return found


def repeated(answer: Encoding, answer_at: int, question: Encoding, question_at: int, size: int) -> dict[int, int]:
    """Which id of an answer repeats which id of a question, where both hold the same name.

    The name has `size` characters and begins at character `answer_at` of the one and `question_at` of the other. The id
    of the question is the one that holds the last character of the answer's: where the two are cut otherwise, as they
    often are behind a space, it is the first that can know the whole piece.
    """
    holder = {at: number for number, (first, stop) in enumerate(question.offsets) for at in range(first, stop)}
    found = {}
    for number, (_, stop) in enumerate(answer.offsets):
        if answer_at < stop <= answer_at + size:
            found[number] = holder[question_at + stop - answer_at - 1]
    return found
