"""Planted lines and questions about them: needles, several values or keys, chains of names, lines to quote.

In: an `ArchiveMaker`. Out: `Sample`s of the same form as its own, whose answer ids know where they stand in the
documents, and over which line the way there leads. For: training/batches.py, training/score.py.

A `Bundle` is some lines to plant, in their order, and questions about them. An answer is made of `Part`s; a part is
copied from a planted line or from one that stood there, so exact positions follow from the characters of both. `links`
lead from the end of one planted text back to an earlier one, for rows of the documents: the second value of a key knows
the first one, so that an answer can go on from value to value.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Encoding

from training import wording
from training.archive import Document, SampleMaker
from training.invent import NOUNS
from training.transcript import Sample, Turn

TOKENS_PER_BUNDLE = 110
ABSENT_SHARE = 0.15
IDENTIFIERS = ("upper", "upper", "snake", "dash", "dash", "camel")
TASK_WEIGHTS = {
    "constant": 3.0,
    "needle": 3.5,
    "values": 1.5,
    "queries": 1.5,
    "trace": 2.0,
    "line": 1.5,
    "exists": 0.7,
    "echo": 0.3,
}


@dataclass(frozen=True)
class Span:
    """Characters of a line: `line` counts within a bundle, `start` within its text. Units: characters."""

    line: int
    start: int


@dataclass(frozen=True)
class Part:
    """A piece of an answer, copied from `source`; finding it leads over the character before `hop`."""

    text: str
    source: Span | None = None
    hop: Span | None = None


@dataclass
class Ask:
    """A question, in which {f} stands for the path of the line `place`, and the parts of its answer."""

    kind: str
    question: str
    parts: list[Part]
    place: int = 0

    @property
    def answer(self) -> str:
        return "".join(part.text for part in self.parts)


@dataclass
class Bundle:
    """Lines to plant, each with what stands in front of it in its row, questions, and links (later, earlier)."""

    lines: list[str] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    links: list[tuple[Span, Span]] = field(default_factory=list)
    is_apart: bool = False


@dataclass
class Placed:
    """Where a text stands: position of its row's first id, the row, its encoding, characters in front of the text."""

    start: int
    line: str
    encoding: Encoding
    lead: int
    document: int
    row: int

    def position(self, end: int) -> int:
        """Position of the id that ends with the character before `end`, or -1 if none ends there."""
        ends = [stop for _, stop in self.encoding.offsets]
        return self.start + ends.index(self.lead + end) if self.lead + end in ends else -1

    def copied(self, piece: str, end: int) -> int:
        """Position of the id that ends with the character before `end` if it is `piece`, spaces aside; else -1."""
        position = self.position(end)
        if position >= 0:
            first, stop = self.encoding.offsets[position - self.start]
            if self.line[first:stop].strip() != piece.strip():
                return -1
        return position


def is_honest(ask: Ask, documents: list[Document]) -> bool:
    """Whether a name that an answer says is not there, is not: an invented one may be a word of a real file."""
    missing = wording.NOT_FOUND.format(k="")
    if not ask.answer.endswith(missing):
        return True
    name = re.escape(ask.answer.removeprefix("The ").removesuffix(missing))
    is_name = re.compile(rf"(?<![\w-]){name}(?![\w-])")
    return not any(is_name.search(line) for document in documents for line in document.lines)


class NeedleMaker(SampleMaker):
    """Makes samples with planted lines; draws from the generator of its archive maker."""

    # -- names and values --------------------------------------------------------------------------------------

    def value(self) -> str:
        """A value: half of them whole numbers of up to nine digits."""
        draw = self.rng.random()
        if draw < 0.5:
            return str(self.rng.randint(10**5, 10 ** self.rng.randint(7, 9)))
        return self.inventor.number() if draw < 0.65 else self.inventor.text()

    def spoken(self) -> str:
        """A name in words, at times with a dash, at times of syllables that mean nothing."""
        rng, draw = self.rng, self.rng.random()
        if draw < 0.35:
            return f"{self.inventor.word()}-{self.inventor.word()} {self.inventor.word()}"
        if draw < 0.55:
            return f"{self.coded()}-{self.coded()}"
        if draw < 0.65:
            return self.coded()
        return " ".join(self.inventor.word() for _ in range(rng.randint(2, 3)))

    def coded(self) -> str:
        """Syllables that mean nothing."""
        draw = self.rng.choice
        return "".join(draw("bcdfghjklmnprstvwz") + draw("aeiou") for _ in range(self.rng.randint(2, 4)))

    def names(self, count: int, draw: Callable[[], str]) -> list[str]:
        """Different names, of which some share a word; none is part of another."""
        found: list[str] = []
        for _ in range(50 * count):
            name = draw()
            if found and self.rng.random() < 0.3:
                name = self.near(self.rng.choice(found), name)
            if len(name) > 2 and not any(name in other or other in name for other in found):
                found.append(name)
            if len(found) == count:
                break
        return found

    def near(self, known: str, other: str) -> str:
        """A name with one word of another name."""
        for mark in ("_", "-", " "):
            ours, theirs = known.split(mark), other.split(mark)
            if len(ours) > 1 and len(theirs) > 1:
                ours[self.rng.randrange(len(ours))] = self.rng.choice(theirs)
                return mark.join(ours)
        return other

    def noun(self) -> str:
        """What a sentence gives the value of."""
        draw, rng = self.rng.random(), self.rng
        if draw < 0.3:
            kind = rng.choice(["magic", "secret", "access", "lucky", "serial", "special magic", "special magic"])
            return f"{kind} {rng.choice(['number', 'number', 'code', 'key', 'word'])}"
        return rng.choice(NOUNS) if draw < 0.7 else f"{self.inventor.word()} {rng.choice(NOUNS)}"

    # -- bundles -----------------------------------------------------------------------------------------------

    def constant(self) -> Bundle:
        """Settings with identifiers as names, asked for with and without "the" and the file."""
        rng = self.rng
        style = rng.choice(IDENTIFIERS)
        form = rng.choice(["{k} = {v}", "{k} = {v}", "{k} = {v}", "{k}: {v}", "{k}={v}", '"{k}": {v}'])
        *known, absent = self.names(rng.randint(2, 5), lambda: self.inventor.name(style))
        bundle = Bundle()
        for name in known:
            value = self.value()
            if form.startswith('"') or (style != "upper" and rng.random() < 0.3):
                value = f'"{value}"'
            bundle.lines.append(form.format(k=name, v=value))
            where = rng.choice(wording.KEY_IN_FILE if rng.random() < 0.4 else wording.KEY)
            ask = Ask("constant", where.replace("{k}", name), [Part(bundle.lines[-1], Span(len(bundle.lines) - 1, 0))])
            ask.place = len(bundle.lines) - 1
            bundle.asks.append(ask)
        if rng.random() < ABSENT_SHARE * len(known):
            question = rng.choice(wording.KEY_IN_FILE if rng.random() < 0.4 else wording.KEY).replace("{k}", absent)
            bundle.asks.append(Ask("absent", question, [Part(wording.NOT_FOUND.format(k=absent))]))
        return bundle

    def needle(self) -> Bundle:
        """Sentences that give one value each to several names."""
        rng, noun = self.rng, self.noun()
        before, link, tail = rng.choice(wording.SENTENCES)
        *known, absent = self.names(rng.choice([2, 2, 3, 4, 5]), self.spoken)
        bundle = Bundle()
        for name in known:
            topic = f"{noun} {link} {name}"
            end = f"{tail} {self.value()}" + ("." if before else "")
            lead = before.format(n=noun)
            bundle.lines.append(f"{lead} {link} {name}{end}")
            start = len(bundle.lines[-1]) - len(end)
            parts = [Part(f"The {topic}"), Part(end, Span(len(bundle.lines) - 1, start))]
            bundle.asks.append(Ask("needle", rng.choice(wording.TOPIC).format(t=topic), parts, len(bundle.lines) - 1))
        if rng.random() < ABSENT_SHARE * len(known):
            topic = f"{noun} {link} {absent}"
            answer = [Part(wording.NOT_FOUND.format(k=f"The {topic}"))]
            bundle.asks.append(Ask("absent", rng.choice(wording.TOPIC).format(t=topic), answer))
        return bundle

    def values(self) -> Bundle:
        """One name with several values, each in a line of its own: the answer lists them in their order."""
        rng, noun = self.rng, self.noun()
        before, link, tail = rng.choice([form for form in wording.SENTENCES if "{n}s" in form[0]])
        bundle = Bundle()
        for name in self.names(rng.choice([1, 1, 2]), self.spoken):
            parts = [Part(f"The {noun}s {link} {name} are: ")]
            last: Span | None = None
            for number in range(rng.choice([2, 2, 3, 4])):
                value = str(rng.randint(10**3, 10 ** rng.randint(4, 7)))
                line = f"{before.format(n=noun)} {link} {name}{tail} {value}."
                place = Span(len(bundle.lines), len(line) - 1 - len(value))
                bundle.lines.append(line)
                end = Span(place.line, len(line) - 1)
                if last is not None:
                    bundle.links.append((end, last))
                last = end
                parts += [Part(", ")] if number else []
                parts.append(Part(value, place))
            question = rng.choice(wording.ALL_OF_TOPIC).format(t=f"{noun}s {link} {name}")
            bundle.asks.append(Ask("values", question, [*parts, Part(".")]))
        return bundle

    def queries(self) -> Bundle:
        """Several names in one question, in any order."""
        rng = self.rng
        is_sentence = rng.random() < 0.6
        bundle, noun = Bundle(), self.noun()
        style = rng.choice(IDENTIFIERS)
        names = self.names(rng.choice([2, 2, 3, 4]), self.spoken if is_sentence else lambda: self.inventor.name(style))
        before, link, tail = rng.choice(wording.SENTENCES) if is_sentence else ("", "", " =")
        parts_of = {}
        for name in names:
            end = f"{tail} {self.value()}"
            lead = f"{before.format(n=noun)} {link} " if is_sentence else ""
            bundle.lines.append(f"{lead}{name}{end}" + ("." if is_sentence else ""))
            parts_of[name] = Part(end, Span(len(bundle.lines) - 1, len(lead) + len(name)))
        rng.shuffle(names)
        listed = " and ".join([", ".join(names[:-1]), names[-1]])
        parts = [Part(f"The {noun}s {link} " if is_sentence else "The values are ")]
        for number, name in enumerate(names):
            parts += [Part(f"{', ' if number else ''}{name}"), parts_of[name]]
        asked = wording.ALL_OF_TOPIC if is_sentence else wording.ALL_OF_NAMES
        topic = f"{noun}s {link} {listed}" if is_sentence else listed
        bundle.asks.append(Ask("queries", rng.choice(asked).format(t=topic), [*parts, Part(".")]))
        return bundle

    def trace(self) -> Bundle:
        """Chains of names, each set to the one before: followed to the value, or from it."""
        rng = self.rng
        style = rng.choice(["upper", "upper", "snake"])
        length = rng.choice([2, 2, 3, 3, 4, 5])
        draw = (lambda: f"VAR_{self.coded().upper()}") if rng.random() < 0.3 else (lambda: self.inventor.name(style))
        names = self.names(2 * length, draw)
        bundle = Bundle()
        for chain in (names[:length], names[length:]):
            if len(chain) < 2:
                continue
            value = str(rng.randint(10**3, 10 ** rng.randint(4, 7)))
            rows = []
            for name, given in zip(chain, [value, *chain], strict=False):
                rows.append(len(bundle.lines))
                bundle.lines.append(f"{name} = {given}")
            bundle.asks += self.trace_asks(bundle, chain, rows, value)
        return bundle

    def trace_asks(self, bundle: Bundle, chain: list[str], rows: list[int], value: str) -> list[Ask]:
        """Questions about one chain; a line found by its right side is found over that side's end."""
        rng, asks = self.rng, []

        def found_by_end(number: int, mark: str) -> list[Part]:
            text = bundle.lines[rows[number]]
            return [Part(mark), Part(text, Span(rows[number], 0), Span(rows[number], len(text)))]

        kind = rng.choice(["all", "end", "end", "next", "next"])
        if kind == "all":
            parts = [part for i in range(len(chain)) for part in found_by_end(i, ", " if i else "")]
            count = wording.NUMBERS[len(chain)]
            asks.append(Ask("trace-all", rng.choice(wording.TRACE_ALL).format(v=value, n=count), parts))
        if kind == "end":
            start = rng.randrange(1, len(chain))
            parts = []
            for i in range(start, -1, -1):
                parts += [Part(", ")] if i < start else []
                parts.append(Part(bundle.lines[rows[i]], Span(rows[i], 0)))
            asks.append(Ask("trace-end", rng.choice(wording.TRACE_END).format(k=chain[start]), parts))
        if kind == "next":
            number = rng.randrange(len(chain))
            given = chain[number - 1] if number else value
            asks.append(Ask("trace-next", rng.choice(wording.TRACE_NEXT).format(v=given), found_by_end(number, "")[1:]))
        return asks

    def line(self) -> Bundle:
        """Lines of words, to be quoted by their beginning or by words within."""
        rng, bundle = self.rng, Bundle()
        for number in range(rng.randint(1, 3)):
            words = [self.inventor.word() for _ in range(rng.randint(6, 12))]
            bundle.lines.append(" ".join(words).capitalize() + rng.choice([".", "", "."]))
            words = bundle.lines[-1].split()
            first = 0 if rng.random() < 0.6 else rng.randint(1, len(words) - 4)
            phrase = " ".join(words[first : first + rng.randint(2, 5 if first == 0 else 3)])
            text = bundle.lines[-1]
            hop = Span(number, text.index(phrase) + len(phrase)) if first else None
            form = rng.choice(wording.LINE_WITH if first else wording.LINE_FROM)
            bundle.asks.append(Ask("line", form.format(k=phrase), [Part(text, Span(number, 0), hop)], number))
        return bundle

    def exists(self) -> Bundle:
        """Whether a name is there."""
        rng = self.rng
        style = rng.choice(IDENTIFIERS)
        *known, absent = self.names(3, lambda: self.inventor.name(style))
        bundle = Bundle([f"{name} = {self.value()}" for name in known])
        for name in [*known, absent]:
            answer = wording.NOT_FOUND if name == absent else wording.FOUND
            question = rng.choice(wording.EXISTS).format(k=name)
            bundle.asks.append(Ask("exists", question, [Part(answer.format(k=name))]))
        return bundle

    def echo(self) -> Bundle:
        """Words of the question to be repeated."""
        text = " ".join(self.inventor.word() for _ in range(self.rng.randint(2, 8)))
        return Bundle([], [Ask("echo", self.rng.choice(wording.ECHO).format(k=text), [Part(text)])])

    def all_keys(self, budget: int) -> Bundle:
        """A file of nothing but sentences of one form."""
        rng, noun = self.rng, self.noun()
        before, link, tail = rng.choice(wording.SENTENCES)
        spoken = (lambda: f"{self.coded()}-{self.coded()}") if rng.random() < 0.5 else self.spoken
        bundle, left, names = Bundle(is_apart=True), budget, set()
        while left > 0:
            name = spoken()
            if name in names:
                continue
            names.add(name)
            end = f"{tail} {rng.randint(10**6, 10**7 - 1)}."
            bundle.lines.append(f"{before.format(n=noun)} {link} {name}{end}")
            left -= len(self.archives.encode(bundle.lines[-1] + "\n"))
            parts = [
                Part(f"The {noun} {link} {name}"),
                Part(end, Span(len(bundle.lines) - 1, len(bundle.lines[-1]) - len(end))),
            ]
            bundle.asks.append(Ask("all-keys", rng.choice(wording.TOPIC).format(t=f"{noun} {link} {name}"), parts))
        bundle.asks = rng.sample(bundle.asks, min(len(bundle.asks), 2 + budget // 100))
        return bundle

    # -- samples -----------------------------------------------------------------------------------------------

    def sample(self, length: int) -> Sample:
        """A conversation of at most `length` + 1 tokens about planted lines."""
        archives, rng = self.archives, self.rng
        count = max(1, min(10, length // 260))
        asked = TOKENS_PER_BUNDLE * count
        if rng.random() < 0.08:
            bundles = [self.all_keys(int((length - asked - 80) * rng.uniform(0.3, 0.95)))]
            documents: list[Document] = []
        else:
            kinds = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()), k=count)
            bundles = [getattr(self, kind)() for kind in kinds]
            planted = sum(len(archives.encode(line)) + 3 for bundle in bundles for line in bundle.lines)
            documents = archives.documents(max(90, int((length - asked - planted - 40) * rng.uniform(0.6, 1.0))))
            documents = [d for d in documents if d.lines[-1].endswith("\n")]
        places = self.plant(documents, bundles)
        ids, line_at, path_at = archives.prompt(documents)
        turns: list[Turn] = []
        spans = []
        for bundle, rows in zip(bundles, places, strict=True):
            placed = [self.placed(documents, line_at, *row) for row in rows]
            spans += [(placed[a.line].position(a.start), placed[b.line].position(b.start)) for a, b in bundle.links]
            asks = [ask for ask in bundle.asks if is_honest(ask, documents)]
            turns += [self.turn(ask, placed, documents) for ask in asks]
            turns += self.where(placed, bundle, documents)
        rng.shuffle(turns)
        sample = archives.conversation(documents, ids, line_at, path_at, turns, length)
        for later, earlier in spans:
            if later >= 0 and earlier >= 0:
                sample.hops[later + 1] = earlier
        return sample

    def where(self, placed: list[Placed], bundle: Bundle, documents: list[Document]) -> list[Turn]:
        """Which file holds a name that a line begins with."""
        if not placed or len(documents) < 2 or self.rng.random() > 0.35:
            return []
        number = self.rng.randrange(len(placed))
        name, found, _ = bundle.lines[number].partition(" = ")
        if not found or sum(name in line for document in documents for line in document.lines) > 1:
            return []
        place = placed[number]
        answer = wording.WHERE.format(k=name, f=documents[place.document].path)
        question = self.rng.choice(wording.QUESTIONS["where"]).format(k=name)
        return [Turn("where", question, answer, place.document, place.row, name)]

    def plant(self, documents: list[Document], bundles: list[Bundle]) -> list[list[tuple[int, int, int]]]:
        """Puts the lines of each bundle into the documents, in their order; per line document, row and lead."""
        if not documents:
            documents.append(Document(self.rng.choice(["text.txt", "notes.md", "list.txt"]), [], [], []))
        ends = np.cumsum([len(d.lines) + 1 for d in documents])
        gaps = int(ends[-1])
        wanted: list[tuple[int, int, int]] = []
        for number, bundle in enumerate(bundles):
            spots = sorted(self.rng.randrange(gaps) for _ in bundle.lines)
            if bundle.is_apart or self.rng.random() < 0.15:
                spots = [self.rng.randrange(gaps)] * len(bundle.lines)
            wanted += [(spot, number, row) for row, spot in enumerate(spots)]
        places: list[list[tuple[int, int, int]]] = [[(0, 0, 0)] * len(bundle.lines) for bundle in bundles]
        for spot, number, row in sorted(wanted, reverse=True):
            index = int(np.searchsorted(ends, spot, side="right"))
            at = spot - (int(ends[index - 1]) if index else 0)
            places[number][row] = (index, at, 0)
        shift: dict[int, int] = {}
        for _, number, row in sorted(wanted):
            index, at, _ = places[number][row]
            text = bundles[number].lines[row]
            lead = self.lead(documents[index].path)
            at += shift.get(index, 0)
            shift[index] = shift.get(index, 0) + 1
            documents[index].lines.insert(at, f"{lead}{text}\n")
            documents[index].ids.insert(at, np.array(self.archives.encode(f"{lead}{text}\n"), dtype=np.uint16))
            places[number][row] = (index, at, len(lead))
        return places

    def lead(self, path: str) -> str:
        """What stands in front of a planted line."""
        if self.rng.random() < 0.7:
            return ""
        return (
            self.rng.choice(["# ", "    ", "    # "]) if path.endswith(".py") else self.rng.choice(["- ", "  ", "* "])
        )

    def placed(self, documents: list[Document], line_at: list[list[int]], document: int, row: int, lead: int) -> Placed:
        """Where a planted text stands."""
        line = documents[document].lines[row]
        encoding = self.archives.tokenizer.encode(line, add_special_tokens=False)
        return Placed(line_at[document][row], line, encoding, lead, document, row)

    def turn(self, ask: Ask, placed: list[Placed], documents: list[Document]) -> Turn:
        """A question with the positions that its answer's ids are copied from, and those the way leads over."""
        answer = ask.answer
        path = documents[placed[ask.place].document].path if placed else ""
        file = path if self.rng.random() < 0.6 else path.rpartition("/")[2]
        encoding = self.archives.tokenizer.encode(answer, add_special_tokens=False)
        sources, hops = [], []
        for first, end in encoding.offsets:
            start = 0
            for part in ask.parts:
                if end <= start + len(part.text):
                    break
                start += len(part.text)
            source = -1
            if part.source is not None:
                source = placed[part.source.line].copied(answer[first:end], part.source.start + end - start)
            sources.append(source)
            hops.append(placed[part.hop.line].position(part.hop.start) if part.hop else -1)
        return Turn(ask.kind, ask.question.replace("{f}", file), answer, pointers=(sources, hops))
