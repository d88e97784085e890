"""Multi-round co-reference: a long conversation with equal requests in it, one of whose answers is to be repeated; for
`eval mrcr`.

The user asks for many short texts: a poem about harbors, a riddle about otters. One request comes `needles` times, each
time with another answer, at random places. At the end the user asks for, say, the second of those answers, behind an
opening of ten random letters. The score is how much of it the answer repeats (difflib's ratio; 0 without the opening).

Source: the task and the grading rule of OpenAI's MRCR, after Michelangelo (arXiv 2409.12640). The texts here are put
together from word lists by a seed, so figures do not compare with the published ones digit by digit.
"""

import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from random import Random

from salalocal.errors import RequestError
from salalocal.evals import invention
from salalocal.evals.asking import Case, Question, Subject
from salalocal.evals.needle import check_count, check_lengths
from salalocal.evals.questionnaire import Place, Questionnaire, Report, Watch, answer_all
from salalocal.evals.scoring import mark_text
from salalocal.prompt.template import Conversation, Turn
from salalocal.session.plan import short_tokens
from salalocal.session.tokens import TextCodec
from salalocal.settings import Settings

MIN_LENGTH = 2048
ANSWER_TOKENS = 256
FORMS = (
    *("poem", "riddle", "letter", "short story", "news report", "speech", "diary entry", "fable", "song", "recipe"),
    *("travel note", "advertisement", "review", "prayer", "lecture", "weather report"),
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_TURN_FRAME_TOKENS = 16
_SENTENCES = 6


@dataclass(frozen=True)
class MrcrRequest:
    """What is asked: how many equal requests there are, lengths in tokens of the whole context, questions of each."""

    lengths: tuple[int, ...]
    needles: tuple[int, ...] = (2, 4, 8)
    samples: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_lengths(self.lengths, MIN_LENGTH)
        check_count("samples", self.samples, 10_000)
        for count in self.needles:
            if not 2 <= count <= len(_ORDINALS):
                raise RequestError(f"--needles {count} should be from 2 to {len(_ORDINALS)}", "--needles 2,4,8")
        if not self.needles:
            raise RequestError("no number of needles given", "--needles 2,4,8")


@dataclass(frozen=True)
class Round:
    """One request of the user and its answer."""

    form: str
    topic: str
    answer: str

    @property
    def request(self) -> str:
        """What the user says."""
        return f"Write a {self.form} about {self.topic}."


def mrcr_cases(request: MrcrRequest, codec: TextCodec) -> Iterator[Case]:
    """The questions, shortest contexts first. Keys and labels: needles, length, sample."""
    for length in request.lengths:
        for needles in request.needles:
            for sample in range(request.samples):
                yield Case(
                    key=f"{length}/{needles}/{sample}",
                    label=f"{needles} needles at {short_tokens(length)}",
                    labels={"length": length, "needles": needles, "sample": sample},
                    cost_tokens=length,
                    make=partial(_question, request.seed, (length, needles, sample), codec),
                )


def _question(seed: int, cell: tuple[int, int, int], codec: TextCodec) -> Question:
    length, needles, _ = cell
    rng = invention.seeded("mrcr", seed, *cell)
    opening = "".join(rng.choices(string.ascii_letters, k=10))
    form, topic = rng.choice(FORMS), _topic(rng)
    answers = invention.distinct(partial(_text, rng, topic), needles)
    wanted = rng.randrange(needles)
    asked = (
        f'Repeat the {_ORDINALS[wanted]} {form} about {topic} that you wrote, word for word, with "{opening}" in front '
        "of it. Write nothing else."
    )
    equal = [Round(form, topic, answer) for answer in answers]
    budget = length - ANSWER_TOKENS - _TURN_FRAME_TOKENS - len(codec.tokenizer.encode(asked))
    rounds = _rounds(rng, equal, budget, codec)
    turns = [Turn(each.request, tuple(codec.tokenizer.encode(each.answer))) for each in rounds]
    mark = partial(mark_text, expected=answers[wanted], opening=opening)
    return Question(Conversation(None, None, (*turns, Turn(asked))), (f"{opening} {answers[wanted]}",), mark)


def _rounds(rng: Random, equal: list[Round], budget: int, codec: TextCodec) -> list[Round]:
    """The equal rounds in their order, among as many others as fit."""

    def cost(each: Round) -> int:
        encode = codec.tokenizer.encode
        return len(encode(each.request)) + len(encode(each.answer)) + _TURN_FRAME_TOKENS

    left = budget - sum(map(cost, equal))
    if left < 0:
        raise RequestError(f"{budget:,} tokens are too few for {len(equal)} texts", "ask for a longer context")
    others: list[Round] = []
    while True:
        topic = _topic(rng)
        other = Round(rng.choice(FORMS), topic, _text(rng, topic))
        if other.request != equal[0].request:
            left -= cost(other)
            if left < 0:
                break
            others.append(other)
    places = set(rng.sample(range(len(others) + len(equal)), len(equal)))
    ours, theirs = iter(equal), iter(others)
    return [next(ours) if place in places else next(theirs) for place in range(len(others) + len(equal))]


def _topic(rng: Random) -> str:
    return f"{rng.choice(invention.ADJECTIVES)} {rng.choice(invention.NOUNS)}s"


def _text(rng: Random, topic: str) -> str:
    """A short text: its first sentence names the topic, the others are drawn from word lists."""
    return " ".join([f"This is about {topic}.", *(invention.sentence(rng) for _ in range(_SENTENCES))])


def measure_mrcr(settings: Settings, request: MrcrRequest, place: Place, watch: Watch) -> Report:
    """Ask a model to repeat answers of long conversations. Raises: as `measure_needles`, but PackError."""
    subject = Subject.find(settings, watch.tell)
    cases = list(mrcr_cases(request, subject.codec))
    asked = Questionnaire("mrcr", ("needles", "length"), asdict(request), cases, max(request.lengths))
    return answer_all(subject, asked, place, watch)
