"""The shipped model: its folder is small and complete, and it answers the questions about the example archive."""

import json
from pathlib import Path

import pytest

import salalocal
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.session.events import TextDelta
from training.tokenizer import BUILTIN

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_BYTES = 25_000_000


def test_the_folder_is_complete_valid_and_small() -> None:
    names = {path.name for path in BUILTIN.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "MODEL_CARD.md"}
    assert sum(path.stat().st_size for path in BUILTIN.iterdir()) <= LIMIT_BYTES
    Checkpoint.open(BUILTIN).validate()


@pytest.mark.slow
def test_it_answers_the_questions_about_the_example() -> None:
    sheet = json.loads((EXAMPLES / "questions.json").read_text())
    session = salalocal.load("builtin").session(files=[EXAMPLES / sheet["archive"]])
    for row in sheet["questions"]:
        if not row["builtin_v0_is_right"]:
            continue
        given = "".join(event.text for event in session.ask(row["question"]) if isinstance(event, TextDelta))
        session.undo()
        assert given == row["answer"]
