"""The questions of a one-shot command: an argument, a file or stdin goes in, a list comes out; for ask."""

from pathlib import Path
from typing import TextIO

from salalocal.errors import RequestError
from salalocal.prompt.visible import quoted_name


def read_questions(question: str | None, path: Path | None, stdin: TextIO | None) -> list[str]:
    """The questions of a one-shot command: the given one, or one a line of a file (`-` is stdin), or all of stdin.

    Raises: RequestError if there is none, or more than one of these.
    """
    if question is not None and path is not None:
        raise RequestError("a question and --from are both given", "give one of them")
    if question is None and path is None and stdin is not None and not stdin.isatty():
        question = stdin.read()
    if question is not None:
        questions = [question.strip()]
    elif path is not None:
        questions = [line.strip() for line in _read_lines(path, stdin)]
    else:
        questions = []
    questions = [line for line in questions if line]
    if not questions:
        raise RequestError("no question given", 'salalocal ask -f PATH "question"')
    return questions


def _read_lines(path: Path, stdin: TextIO | None) -> list[str]:
    if str(path) == "-":
        if stdin is None:
            raise RequestError("stdin is both a document and the questions", "give the questions as a file")
        return stdin.read().splitlines()
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RequestError(f"cannot read the questions in {quoted_name(str(path))}: {reason}", "check --from") from None
