"""RULER's families of tasks, generated here: needles of four kinds, variable tracing, counting words, questions over
files; for `eval ruler`.

    single           one needle in the haystack
    multi-key        four needles with other keys, one is asked for
    all-keys         nothing but needles, one is asked for
    multi-value      four values of one key, all are asked for
    multi-query      four keys, all are asked for
    variable-tracing one chain of five variables among others; which ones have the value
    common-words     a list in which ten words are frequent; which
    frequent-words   coded words after Zipf's law; the three most frequent
    files            a question about what the files of the haystack say

The score of an answer is the share of the expected texts that it names, as in RULER; it is right if it names all.
Source: the task descriptions of RULER (arXiv 2404.06654). Wordings, words and generators are our own, so figures do not
compare with the published ones digit by digit.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from random import Random

from salalocal.errors import RequestError
from salalocal.evals import invention
from salalocal.evals.asking import Case, Question, Subject
from salalocal.evals.facts import facts_in
from salalocal.evals.haystack import Haystack, Planted, ask_about, document_budget, largest, made_document
from salalocal.evals.needle import check_count, check_lengths
from salalocal.evals.questionnaire import Place, Questionnaire, Report, Watch, answer_all, open_haystack
from salalocal.evals.scoring import mark_all
from salalocal.prompt.pack import PromptPack
from salalocal.session.plan import short_tokens
from salalocal.session.start import Sources
from salalocal.session.tokens import TextCodec
from salalocal.settings import Settings

_NEEDLE = "One of the special magic numbers for {name} is: {value}."
_QUESTION_TOKENS = 96
MIN_LENGTH = 4096  # ten words thirty times each take most of it
_PATH = "text.txt"


@dataclass(frozen=True)
class RulerRequest:
    """What is asked: families of tasks, lengths in tokens of the whole context, questions of each."""

    lengths: tuple[int, ...]
    tasks: tuple[str, ...] = ()
    samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_lengths(self.lengths, MIN_LENGTH)
        check_count("samples", self.samples, 10_000)
        for task in self.tasks:
            if task not in TASKS:
                raise RequestError(f"no task is called {task[:40]!r}", f"use some of {', '.join(TASKS)}")


@dataclass(frozen=True)
class Material:
    """What a generator draws from. Units: num_tokens, what its documents may take."""

    rng: Random
    haystack: Haystack
    codec: TextCodec
    num_tokens: int


def ruler_cases(request: RulerRequest, haystack: Haystack, codec: TextCodec) -> Iterator[Case]:
    """The questions, shortest contexts first. Keys and labels: task, length, sample."""
    for length in request.lengths:
        for task in request.tasks or TASKS:
            for sample in range(request.samples):
                yield Case(
                    key=f"{length}/{task}/{sample}",
                    label=f"{task} at {short_tokens(length)}",
                    labels={"length": length, "task": task, "sample": sample},
                    cost_tokens=length,
                    make=partial(_question, request.seed, (length, task, sample), haystack, codec),
                )


def _question(seed: int, cell: tuple[int, str, int], haystack: Haystack, codec: TextCodec) -> Question:
    length, task, _ = cell
    rng = invention.seeded("ruler", seed, *cell)
    budget = document_budget(length, "", codec) - _QUESTION_TOKENS
    return TASKS[task](Material(rng, haystack, codec, budget))


def _needles(material: Material, num_keys: int, num_values: int, num_asked: int) -> Question:
    """Needles in a haystack: `num_keys` keys with `num_values` values each, of which `num_asked` keys are asked for."""
    rng, codec = material.rng, material.codec
    sample = _NEEDLE.format(name=invention.spoken_name(rng), value=invention.number(rng))
    room = num_keys * num_values * (len(codec.tokenizer.encode(sample + "\n")) + 8)
    stack = material.haystack.stack(max(1, material.num_tokens - room), rng)
    names = invention.distinct(partial(invention.spoken_name, rng), num_keys, stack.__contains__)
    values = invention.distinct(partial(invention.number, rng), num_keys * num_values, stack.__contains__)
    of_name = {name: values[i * num_values : (i + 1) * num_values] for i, name in enumerate(names)}
    lines = [_NEEDLE.format(name=name, value=value) for name in names for value in of_name[name]]
    pack = stack.plant([Planted(rng.random(), line) for line in lines])
    asked = rng.sample(names, num_asked)
    return _marked(pack, _needle_question(asked, num_values), [value for name in asked for value in of_name[name]])


def _all_keys(material: Material) -> Question:
    """Nothing but needles."""
    rng = material.rng

    def line(pair: tuple[str, str]) -> str:
        return _NEEDLE.format(name=pair[0], value=pair[1])

    def pairs(count: int) -> list[tuple[str, str]]:
        drawn = Random(rng_seed)
        names = invention.distinct(lambda: f"{invention.coded_word(drawn)}-{invention.coded_word(drawn)}", count)
        return list(zip(names, invention.distinct(partial(invention.number, drawn), count), strict=True))

    rng_seed = rng.random()
    count = _fitting(material, lambda n: "".join(f"{line(pair)}\n" for pair in pairs(n)))
    drawn = pairs(count)
    name, value = rng.choice(drawn)
    text = "".join(f"{line(pair)}\n" for pair in drawn)
    return _marked(_pack(text), _needle_question([name], 1), [value])


def _variable_tracing(material: Material) -> Question:
    """Chains of five variables, their lines in order at random places; all of one chain are asked for."""
    rng = material.rng
    lines_of: list[list[str]] = []
    names = invention.distinct(lambda: f"VAR_{invention.coded_word(rng).upper()}", 10, material_has(material))
    values = invention.distinct(partial(invention.number, rng), 2)
    for chain, value in zip((names[:5], names[5:]), values, strict=True):
        given = [value, *chain[:-1]]
        lines_of.append([f"{name} = {source}" for name, source in zip(chain, given, strict=True)])
    room = sum(len(material.codec.tokenizer.encode(f"{line}\n")) + 4 for lines in lines_of for line in lines)
    stack = material.haystack.stack(max(1, material.num_tokens - room), rng)
    planted = []
    for lines in lines_of:
        depths = sorted(rng.random() for _ in lines)
        planted += [Planted(depth, line) for depth, line in zip(depths, lines, strict=True)]
    question = (
        f"Which variables have the value {values[0]}, directly or through other variables? Five do; name all of them."
    )
    return _marked(stack.plant(planted), question, names[:5])


def _common_words(material: Material) -> Question:
    """A numbered list of words: ten of them stand in it thirty times each, the others three times."""
    rng_seed = material.rng.random()

    def words(num_rare: int) -> tuple[list[str], list[str]]:
        drawn = Random(rng_seed)
        known = invention.distinct(partial(invention.coded_word, drawn), 10 + num_rare)
        listed = known[:10] * 30 + known[10:] * 3
        drawn.shuffle(listed)
        return listed, known[:10]

    def text(listed: list[str]) -> str:
        return " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1)) + "\n"

    count = _fitting(material, lambda n: text(words(n)[0]), smallest=1)
    listed, common = words(count)
    return _marked(_pack(text(listed)), "What are the 10 most common words in the list?", common)


def _frequent_words(material: Material) -> Question:
    """Coded words whose counts fall as 1 / rank^2; the three most frequent ones are asked for."""
    rng_seed = material.rng.random()

    def words(num_words: int) -> tuple[list[str], list[str]]:
        drawn = Random(rng_seed)
        known = invention.distinct(partial(invention.coded_word, drawn), 40)
        scale = num_words / sum(1 / rank**2 for rank in range(1, 41))
        listed = [word for rank, word in enumerate(known, 1) for _ in range(max(1, round(scale / rank**2)))]
        drawn.shuffle(listed)
        return listed, known[:3]

    count = _fitting(material, lambda n: " ".join(words(n)[0]) + "\n", smallest=100)
    listed, frequent = words(count)
    question = "What are the three most frequent words in the coded text?"
    return _marked(_pack(" ".join(listed) + "\n"), question, frequent)


def _files(material: Material) -> Question:
    """A question about a fact that the files state once."""
    stack = material.haystack.stack(material.num_tokens, material.rng)
    facts = facts_in(stack.distinct)
    if not facts:
        raise RequestError("the files state nothing that can be asked", "give files with code or prose in them")
    kind = material.rng.choice(sorted({fact.kind for fact in facts}))
    fact = material.rng.choice([fact for fact in facts if fact.kind == kind])
    return Question(ask_about(stack.plant(()), fact.question), (fact.value,), fact.mark)


TASKS: dict[str, Callable[[Material], Question]] = {
    "single": partial(_needles, num_keys=1, num_values=1, num_asked=1),
    "multi-key": partial(_needles, num_keys=4, num_values=1, num_asked=1),
    "all-keys": _all_keys,
    "multi-value": partial(_needles, num_keys=1, num_values=4, num_asked=1),
    "multi-query": partial(_needles, num_keys=4, num_values=1, num_asked=4),
    "variable-tracing": _variable_tracing,
    "common-words": _common_words,
    "frequent-words": _frequent_words,
    "files": _files,
}


def material_has(material: Material) -> Callable[[str], bool]:
    """Whether a text stands anywhere in the haystack."""
    return lambda text: any(text in document.text for document in material.haystack.documents)


def _needle_question(names: list[str], num_values: int) -> str:
    listed = " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
    if len(names) == 1 and num_values == 1:
        return f"What is the special magic number for {listed} mentioned in the documents?"
    return f"What are all the special magic numbers for {listed} mentioned in the documents?"


def _marked(pack: PromptPack, question: str, expected: list[str]) -> Question:
    return Question(ask_about(pack, question), tuple(expected), partial(mark_all, expected=tuple(expected)))


def _pack(text: str) -> PromptPack:
    return PromptPack((made_document(_PATH, text),))


def _fitting(material: Material, text_of: Callable[[int], str], smallest: int = 1) -> int:
    """The largest number of things whose text fits, to half a percent. Raises: RequestError if `smallest` do not."""
    encode = material.codec.tokenizer.encode

    def fits(count: int) -> bool:
        return len(encode(text_of(count))) <= material.num_tokens

    if not fits(smallest):
        raise RequestError(f"{material.num_tokens:,} tokens are too few for this task", "ask for a longer context")
    first, second = (len(encode(text_of(count))) for count in (smallest, 2 * smallest))
    likely = smallest + (material.num_tokens - first) * smallest // max(1, second - first)
    step = max(1, likely // 200)
    return smallest + step * largest(2 * (1 + likely // step), lambda number: fits(smallest + step * number))


def measure_ruler(settings: Settings, request: RulerRequest, sources: Sources, place: Place, watch: Watch) -> Report:
    """Ask a model the questions of RULER's families. Raises: as `measure_needles`."""
    subject = Subject.find(settings, watch.tell)
    haystack = open_haystack(subject, sources, watch.tell)
    decided = {**asdict(request), **haystack.to_json()}
    cases = list(ruler_cases(request, haystack, subject.codec))
    asked = Questionnaire("ruler", ("task", "length"), decided, cases, max(request.lengths))
    return answer_all(subject, asked, place, watch)
