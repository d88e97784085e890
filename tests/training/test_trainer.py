"""Steps on the CPU in small: every weight learns, an interrupted run goes on with the same batches and weights."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch
from training_cases import SMALL_SHAPE, small_corpus, trainer_in, words_of

from training.batches import Batch, Stream
from training.model import EmbeddedModel
from training.stages import STAGES, Part, Phase
from training.trainer import Trainer, restore, save

CPU = torch.device("cpu")


@pytest.fixture
def phase() -> Phase:
    return dataclasses.replace(STAGES["5"][0], parts=(Part(384, 2),), needle_share=0.3, aimed_share=0.4)


def stream_of(phase: Phase, seed: int, first: int = 0) -> Stream:
    return Stream(small_corpus(), words_of(small_corpus(), False), phase, f"{seed}", first)


def steps(trainer: Trainer, phase: Phase, seed: int, count: int) -> None:
    """So many steps from where the trainer is, then a save."""
    batches = iter(stream_of(phase, seed, trainer.place.batch))
    for _ in range(count):
        trainer.step(phase, next(batches).to(CPU), 0.1)
        trainer.place.batch += 1
    trainer.save()


def test_a_step_moves_the_weights_and_the_average_half_as_far(tmp_path: Path, seed: int, phase: Phase) -> None:
    trainer = trainer_in(tmp_path, seed)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    batches = iter(stream_of(phase, seed))
    parts = trainer.step(phase, next(batches).to(CPU), 0.1)
    assert all(value.isfinite().all() for value in parts.values())
    kinds = [value for name, value in parts.items() if name.startswith("=")]
    total, count = torch.stack(kinds).sum(0)
    assert total / count == pytest.approx(float(parts["answer"][0]), rel=1e-3)
    after = trainer.model.state_dict()
    moved = {name: (weight - before[name]).norm() for name, weight in after.items()}
    assert all(distance > 0 for distance in moved.values())
    trainer.step(phase, next(batches).to(CPU), 0.1)
    assert trainer.average is not None
    for name, weight in trainer.average.state_dict().items():
        assert 0 < (weight - before[name]).norm() < 2.1 * moved[name] + (after[name] - before[name]).norm()


def test_an_interrupted_run_gives_the_weights_of_an_uninterrupted_one(tmp_path: Path, seed: int, phase: Phase) -> None:
    whole = trainer_in(tmp_path / "whole", seed)
    steps(whole, phase, seed, 4)
    steps(trainer_in(tmp_path / "cut", seed), phase, seed, 2)
    second = trainer_in(tmp_path / "cut", seed + 1)
    second.load_state()
    assert second.steps == second.place.batch == 2
    steps(second, phase, seed, 2)
    for one, two in ((whole.model, second.model), (whole.average, second.average), (whole.probes, second.probes)):
        assert one is not None and two is not None
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, two.state_dict()[name]), name


def test_batches_depend_on_their_number_only(seed: int, phase: Phase) -> None:
    def ids(batches: list[Batch]) -> list[list[int]]:
        return [batch.ids.flatten().tolist() for batch in batches]

    first = iter(stream_of(phase, seed))
    four = ids([next(first) for _ in range(4)])
    later = iter(stream_of(phase, seed, 2))
    assert ids([next(later) for _ in range(2)]) == four[2:]
    assert four[0] != four[1]


def test_a_length_that_does_not_fit_is_left_out_and_named(
    tmp_path: Path, seed: int, phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_in(tmp_path, seed)
    trainer.deadline = time.time() + 1.5

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(trainer, "step", no_room)
    trainer.run(phase, (0.0, 1.0), iter(stream_of(phase, seed)))
    assert trainer.left_out == {384} and '"left_out_for_memory": 384' in (tmp_path / "log.jsonl").read_text()


def test_saved_weights_are_read_back(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    one, two = EmbeddedModel(SMALL_SHAPE), EmbeddedModel(SMALL_SHAPE)
    save(one, tmp_path)
    restore(two, tmp_path)
    assert all(torch.equal(weight, two.state_dict()[name]) for name, weight in one.state_dict().items())
