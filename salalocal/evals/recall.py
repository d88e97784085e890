"""Questions about the user's own files, made from them and checked against them; for `eval recall`.

The files are read once, all of them, as `ask` would read them; then every question is asked behind them by itself.
What is asked: values of constants and settings, signatures, base classes, docstrings, how a line of prose goes on
(`facts`). The kinds take turns, and within a kind questions are spread evenly over the files.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate

from salalocal.errors import RequestError
from salalocal.evals import invention
from salalocal.evals.asking import Case, Question, Subject
from salalocal.evals.facts import Fact, facts_in
from salalocal.evals.haystack import Haystack, ask_about
from salalocal.evals.needle import check_count
from salalocal.evals.questionnaire import Place, Questionnaire, Report, Watch, answer_all
from salalocal.prompt.pack import PromptPack
from salalocal.session.start import Sources
from salalocal.session.tokens import QUESTION_TOKENS, ContextOverflow, TextCodec
from salalocal.settings import Settings

TENTHS = 10


@dataclass(frozen=True)
class RecallRequest:
    """How many questions, and the seed that chooses them."""

    questions: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("questions", self.questions, 100_000)


def recall_cases(request: RecallRequest, pack: PromptPack, codec: TextCodec) -> Iterator[Case]:
    """The questions. Labels: kind, part (which tenth of the documents' tokens the fact stands in, from 1), path, line.

    Raises: RequestError if the files state nothing that can be asked.
    """
    facts = chosen_facts(facts_in(pack.documents), request)
    tokens = codec.template.count_document_tokens(pack)
    ends = list(accumulate(count for _, count in tokens))
    place_of = {path: (end - count, count) for (path, count), end in zip(tokens, ends, strict=True)}
    num_lines = {document.path: document.text.count("\n") + 1 for document in pack.documents}
    for number, fact in enumerate(facts):
        start, count = place_of[fact.path]
        place = start + count * fact.line / num_lines[fact.path]
        part = min(TENTHS, 1 + int(TENTHS * place / ends[-1]))
        yield Case(
            key=f"{fact.kind}/{fact.name}",
            label=f"{fact.kind} {fact.name}",
            labels={"kind": fact.kind, "part": part, "name": fact.name, "path": fact.path, "line": fact.line + 1},
            cost_tokens=ends[-1] if number == 0 else 64,
            make=partial(_question, pack, fact),
        )


def chosen_facts(facts: Sequence[Fact], request: RecallRequest) -> list[Fact]:
    """As many facts as are asked for: the kinds take turns, each spread evenly over its facts in their order.

    Raises: RequestError if there is none.
    """
    if not facts:
        raise RequestError("the files state nothing that can be asked", "give files with code, settings or prose")
    by_kind: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_kind[fact.kind].append(fact)
    wanted: dict[str, int] = dict.fromkeys(by_kind, 0)
    left = min(request.questions, len(facts))
    while left:
        for kind, known in by_kind.items():
            if left and wanted[kind] < len(known):
                wanted[kind] += 1
                left -= 1
    rng = invention.seeded("recall", request.seed)
    return [fact for kind, known in by_kind.items() for fact in _spread(known, wanted[kind], rng.random())]


def _spread(facts: Sequence[Fact], count: int, offset: float) -> list[Fact]:
    return [facts[int((i + offset) * len(facts) / count)] for i in range(count)]


def _question(pack: PromptPack, fact: Fact) -> Question:
    return Question(ask_about(pack, fact.question), (fact.value,), fact.mark)


def measure_recall(settings: Settings, request: RecallRequest, sources: Sources, place: Place, watch: Watch) -> Report:
    """Read files and ask a model what they say.

    Raises: as `measure_needles`; ContextError if the files do not fit the context that was asked for.
    """
    subject = Subject.find(settings, watch.tell)
    haystack = Haystack.of_files(sources, subject.codec, watch.tell)
    pack = PromptPack(haystack.documents)
    report = subject.codec.report(pack)
    watch.tell(f"files: {report.num_files}, {report.total_tokens:,} tokens")
    if settings.ctx is not None and report.total_tokens >= settings.ctx:
        raise ContextOverflow(report, settings.ctx)
    cases = list(recall_cases(request, pack, subject.codec))
    if len(cases) < request.questions:
        watch.tell(f"they state {len(cases):,} things that can be asked")
    decided = {**asdict(request), **haystack.to_json()}
    asked = Questionnaire("recall", ("kind", "part"), decided, cases, report.total_tokens + QUESTION_TOKENS)
    return answer_all(subject, asked, place, watch)
