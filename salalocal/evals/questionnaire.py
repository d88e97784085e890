"""A study of questions from start to report: cases in, shares with intervals by cell out; for needle, ruler, mrcr and
recall.

The model is loaded only if a question is still open, with memory for the longest context, checked first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salalocal.checkpoint.hub import is_builtin
from salalocal.device import pick_device
from salalocal.evals.asking import Asker, Case, Subject
from salalocal.evals.haystack import Haystack
from salalocal.evals.scoring import Mark, Share
from salalocal.evals.study import Record, Study, StudyProgress, identity_name, open_study
from salalocal.session.start import BUILTIN_TRAINED_TOKENS, Sources, Tell
from salalocal.settings import state_folder


@dataclass(frozen=True)
class Place:
    """Where the records go: a folder, or None for one of their own among the user's; `is_fresh` begins anew."""

    folder: Path | None = None
    is_fresh: bool = False


@dataclass(frozen=True)
class Watch:
    """Who is told: progress while it runs, and lines of narration."""

    on_progress: Callable[[StudyProgress], None]
    tell: Tell


@dataclass(frozen=True)
class Questionnaire:
    """What is asked. `axes` name the labels that make a cell of the table; `settings` decide the cases, as plain data.

    Units: num_tokens, the longest context.
    """

    evaluation: str
    axes: tuple[str, ...]
    settings: Mapping[str, Any]
    cases: Sequence[Case]
    num_tokens: int


@dataclass(frozen=True)
class Report:
    """What came out: the study's identity, the records' folder, the records in order, and the axes of the table."""

    identity: Record
    folder: Path
    axes: tuple[str, ...]
    records: tuple[Record, ...]

    def shares(self, *axes: str) -> dict[tuple[Any, ...], Share]:
        """The share of right answers by the values of some labels, in the order in which they first appear."""
        groups: dict[tuple[Any, ...], list[Mark]] = {}
        for record in self.records:
            key = tuple(record[axis] for axis in axes)
            groups.setdefault(key, []).append(Mark(record["score"], record["right"]))
        return {key: Share.of(marks) for key, marks in groups.items()}

    @property
    def total(self) -> Share:
        """The share of right answers over all."""
        return self.shares()[()]

    @property
    def num_cut(self) -> int:
        """Answers that did not end by themselves."""
        return sum(record["reason"] != "stop" for record in self.records)

    def to_json(self) -> dict[str, Any]:
        """Plain data: what was measured, every cell, each axis by itself, the total."""

        def rows(*axes: str) -> list[dict[str, Any]]:
            shares = self.shares(*axes)
            return [dict(zip(axes, key, strict=True)) | share.to_json() for key, share in shares.items()]

        return {
            **self.identity,
            "results": str(self.folder),
            "cells": rows(*self.axes),
            **{f"by_{axis}": rows(axis) for axis in self.axes},
            "total": self.total.to_json(),
            "answers_not_ended": self.num_cut,
        }


def answer_all(subject: Subject, questionnaire: Questionnaire, place: Place, watch: Watch) -> Report:
    """Ask what is not answered yet and report on all.

    Raises: as `open_study` and `Subject.open`; ContextError, MemoryBudgetError, NumericError.
    """
    cases = questionnaire.cases
    with opened(subject, questionnaire.evaluation, questionnaire.settings, place, watch) as study:
        num_done = sum(case.key in study.records for case in cases)
        if num_done:
            watch.tell(f"{num_done:,} of {len(cases):,} questions were answered before; --fresh asks anew")
        if num_done < len(cases):
            _tell_reach(subject, questionnaire.num_tokens, watch.tell)
            asker = Asker(subject.open(questionnaire.num_tokens), subject.max_tokens)
            study.run([asker.task(case) for case in cases], watch.on_progress)
        records = tuple(study.records[case.key] for case in cases)
    return Report(study.identity, study.folder, questionnaire.axes, records)


@contextmanager
def opened(
    subject: Subject, evaluation: str, decided: Mapping[str, Any], place: Place, watch: Watch
) -> Iterator[Study]:
    """The study of this model and these settings, open at its place. Raises: as `open_study`; BackendError."""
    device = pick_device(subject.settings.device).type
    identity = {"evaluation": evaluation, **subject.identity(), "device": device, **decided}
    folder = place.folder or state_folder() / "evaluations" / identity_name(identity)
    with open_study(folder, identity, place.is_fresh) as study:
        watch.tell(f"results: {folder}")
        yield study


def open_haystack(subject: Subject, sources: Sources, tell: Tell) -> Haystack:
    """The user's files as a haystack, or the shipped texts if none are named. Raises: PackError, RequestError."""
    if sources.paths:
        haystack = Haystack.of_files(sources, subject.codec, tell)
    else:
        haystack = Haystack.shipped(subject.codec)
    tell(f"haystack: {haystack.name}, {haystack.num_tokens:,} tokens; longer contexts repeat them")
    return haystack


def _tell_reach(subject: Subject, num_tokens: int, tell: Tell) -> None:
    """Tell where the model is asked for more than it was made for."""
    limit = subject.context_limit
    if is_builtin(subject.settings.model) and num_tokens > BUILTIN_TRAINED_TOKENS:
        tell(
            f"the built-in model was trained on up to {BUILTIN_TRAINED_TOKENS:,} tokens: longer contexts go beyond that"
        )
    elif limit is not None and num_tokens > limit:
        tell(f"the model was made for contexts of up to {limit:,} tokens: longer ones go beyond that")
