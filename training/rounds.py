"""Conversations without documents: equal requests with different answers, one of which is to be repeated.

In: an `ArchiveMaker`. Out: `Sample`s whose answer ids know where in the conversation they stand. For:
training/batches.py, training/compare.py.
"""

import string

from training import wording
from training.archive import SampleMaker
from training.transcript import Sample, Turn


class RoundMaker(SampleMaker):
    """Makes conversations; draws from the generator of its archive maker."""

    def sample(self, length: int) -> Sample:
        """A conversation with equal requests in it, one of whose answers is to be repeated behind an opening."""
        archives, rng = self.archives, self.rng
        forms = rng.sample(wording.FORMS, 4)
        topics = [f"{self.inventor.word()} {self.inventor.word()}s" for _ in range(3)]
        count = rng.choice([2, 2, 3, 4]) if length > 1000 else 2
        request = wording.REQUEST.format(f=forms[0], t=topics[0])
        size = rng.randint(1, 2 if length < 1000 else 5)
        rounds = [(request, self.story(topics[0], size)) for _ in range(count)]
        left = length - 260 - sum(len(archives.encode(a + b)) + 16 for a, b in rounds)
        while left > 40:
            form, topic = rng.choice(forms), rng.choice(topics)
            other = wording.REQUEST.format(f=form, t=topic)
            if other != request:
                rounds.append((other, self.story(topic, size)))
                left -= len(archives.encode("".join(rounds[-1]))) + 16
        rng.shuffle(rounds)
        ids = [1, *archives.user]
        starts = []
        for asked, answer in rounds:
            ids += [*archives.encode(asked), *archives.assistant]
            starts.append(len(ids))
            ids += [*archives.encode(answer), archives.im_end, *archives.newline, *archives.user]
        equal = [(start, answer) for start, (asked, answer) in zip(starts, rounds, strict=True) if asked == request]
        turns = [self.repeat(forms[0], topics[0], equal, number) for number in rng.sample(range(count), 2)]
        return archives.conversation([], ids, [], [], turns, length)

    def repeat(self, form: str, topic: str, equal: list[tuple[int, str]], number: int) -> Turn:
        """The request to repeat one of the equal answers."""
        start, text = equal[number]
        opening = "".join(self.rng.choices(string.ascii_letters, k=10))
        question = self.rng.choice(wording.REPEAT).format(n=wording.ORDINALS[number], f=form, t=topic, o=opening)
        answer = f"{opening} {text}"
        encoding = self.archives.tokenizer.encode(answer, add_special_tokens=False)
        stood = self.archives.tokenizer.encode(text, add_special_tokens=False)
        ends = {end: start + i for i, (_, end) in enumerate(stood.offsets)}
        sources = [ends.get(end - len(opening) - 1, -1) for _, end in encoding.offsets]
        return Turn("repeat", question, answer, pointers=(sources, [-1] * len(sources)))

    def story(self, topic: str, size: int) -> str:
        """Some sentences about a topic."""
        word = self.inventor.word
        rest = [f"The {word()} {word()} {word()} the {word()} {word()}." for _ in range(size)]
        return " ".join([f"This is about {topic}.", *rest])
