"""What tests of sessions share: one over three small files, and what its answers must be."""

from collections.abc import Iterable, Sequence
from typing import Any

from tiny_model import make_pack

from salalocal.engine.sampling_params import SamplingParams
from salalocal.prompt.template import Conversation
from salalocal.prompt.template import Turn as PromptTurn
from salalocal.session.events import Event, Finish, TextDelta
from salalocal.session.runtime import Runtime
from salalocal.session.session import Session

GREEDY = SamplingParams(max_tokens=12)
PACK = {"one": "alpha = 1\n" * 10, "two": "beta = 2\n" * 14, "three": "gamma = 3\n" * 9}


def open_session(runtime: Runtime, **options: Any) -> Session:
    options.setdefault("pack", make_pack(**PACK))
    return runtime.session(sampling=GREEDY, **options)


def finish_of(events: Iterable[Event]) -> Finish:
    last = list(events)[-1]
    assert isinstance(last, Finish)
    return last


def text_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def prompt_ids(runtime: Runtime, session: Session, turns: Sequence[PromptTurn]) -> list[int]:
    segments = runtime.codec.template.render(Conversation(None, session.pack, tuple(turns)))
    return [token for segment in segments for token in segment.ids]


def assert_last_turn_is_greedy(runtime: Runtime, session: Session) -> None:
    """Each token of the last answer must be the likeliest after a cold read of everything before it."""
    *earlier, last = session.turns
    turns = [*(PromptTurn(turn.question, turn.answer_ids) for turn in earlier), PromptTurn(last.question)]
    prompt = prompt_ids(runtime, session, turns)
    logits = runtime.logits([*prompt, *last.answer_ids])[len(prompt) - 1 : -1]
    assert len(last.answer_ids) > 0
    for row, token in zip(logits, last.answer_ids, strict=True):
        assert row[token] >= row.max() - 1e-2
