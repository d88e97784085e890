"""A run that is cut into commands: the first stops in time, the next one ends it with the rate at its end."""

import argparse
import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_cases import small_corpus, trainer_in, words_of

from training.archive import ArchiveMaker
from training.stages import STAGES, Part
from training.train import run
from training.trainer import has_state


class Clock:
    """Time that passes by being asked for."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        self.now += 0.02
        return self.now


def test_a_command_that_is_late_stops_and_the_next_one_ends_the_run(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("training.trainer.time", SimpleNamespace(time=clock.time))
    corpus = small_corpus()
    words = words_of(corpus, False)
    phases = [dataclasses.replace(p, parts=(Part(256, 1),), seconds=1.0) for p in STAGES["small"]]
    monkeypatch.setitem(STAGES, "small", phases)
    monkeypatch.setattr("training.train.CHECKS", {256: 1})
    monkeypatch.setattr("training.trainer.SPARE_S", 0.2)
    monkeypatch.setattr("training.trainer.WARM_STEPS", 1)
    arguments = argparse.Namespace(stage="small", workers=0)
    maker = ArchiveMaker(corpus, words, random.Random(seed))
    late = trainer_in(tmp_path, seed)
    late.pace, late.deadline = 1e-3, clock.now + 1.0
    run(late, corpus, maker, words, arguments)
    assert late.place.phase == 0 and late.place.batch > 1 and has_state(tmp_path)
    final = trainer_in(tmp_path, seed + 1)
    final.load_state()
    assert final.place == late.place
    final.is_spread, final.deadline = True, clock.now + 4.0
    rates: list[float] = []
    step = final.step
    monkeypatch.setattr(final, "step", lambda phase, batch, rate: rates.append(rate) or step(phase, batch, rate))
    run(final, corpus, maker, words, arguments)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "stopped" in next(row for row in rows if "stopped" in row or "finished" in row)
    assert rows[-1]["finished"]
    assert final.place.phase == 1 and final.place.done >= 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.08 and rates[-1] < 0.02
