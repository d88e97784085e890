"""The end of a step: formula, torch form and kernel agree, and what each leaves is what the next step needs."""

from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from salalocal.kernels.sampling import SamplingTensors, new_sampling_tensors
from salalocal.kernels.step_end import StepTensors, end_step_definition, end_step_reference, end_step_triton

CPU = torch.device("cpu")
FORMS = [end_step_definition, end_step_reference, end_step_triton]


class Case(NamedTuple):
    """Everything that the end of a step reads and writes."""

    found: Tensor
    sampling: SamplingTensors
    step: StepTensors

    def numbers(self) -> list[list[int]]:
        """All that it may write."""
        of_step = [getattr(self.step, field.name).tolist() for field in fields(StepTensors)]
        return [*of_step, self.sampling.step.tolist(), self.sampling.is_damaged.tolist()]


def case(
    found: list[int], guesses: list[int], position: int = 70_000, parity: int = 0, is_damaged: bool = False
) -> Case:
    """Rows that fed 5 and guesses, and found these tokens; what is behind them must stay -77."""
    fed = torch.tensor([5, *guesses] + [-77] * (15 - len(guesses)))
    sampling = new_sampling_tensors(CPU, 32)
    sampling.step.fill_(9)
    sampling.is_damaged.fill_(int(is_damaged))
    count = torch.full((1,), -77, dtype=torch.int32)
    step = StepTensors(
        fed,
        torch.tensor([position]),
        count,
        torch.full((1,), parity, dtype=torch.int32),
        torch.full((17,), -77),
    )
    return Case(torch.tensor(found), sampling, step)


@pytest.mark.parametrize("end_step", FORMS)
@pytest.mark.parametrize(
    ("found", "guesses", "count"),
    [
        ([11], [], 1),
        ([11, 12, 13], [11, 12], 3),
        ([11, 12, 13], [11, 40], 2),
        ([11, 12, 13], [40, 12], 1),
        ([0, 0, 0, 0], [0, 0, 1], 3),
        (list(range(16)), list(range(15)), 16),
    ],
)
def test_what_a_step_leaves(end_step: Callable[..., None], found: list[int], guesses: list[int], count: int) -> None:
    made = case(found, guesses, parity=1)
    end_step(*made)
    step = made.step
    assert step.count.tolist() == [count] and step.parity.tolist() == [0]
    assert step.fed.tolist() == [found[count - 1], *guesses] + [-77] * (15 - len(guesses))
    assert step.report.tolist() == [count, *found] + [-77] * (16 - len(found))
    assert step.position.tolist() == [70_000 + count] and made.sampling.step.tolist() == [9 + count]


@pytest.mark.parametrize("end_step", FORMS)
def test_damage_hides_every_token_and_moves_on_all_the_same(end_step: Callable[..., None]) -> None:
    made = case([11, 12], [11], is_damaged=True)
    end_step(*made)
    assert made.step.report.tolist()[:4] == [2, -1, -1, -77] and made.step.fed[0] == 12
    assert made.sampling.is_damaged.tolist() == [1]  # the host clears it, nobody else


def test_all_forms_agree_step_after_step(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for num_rows in (1, 2, 3, 7, 8, 15, 16):
        guesses = torch.randint(0, 2, (num_rows - 1,), generator=generator).tolist()
        made = [case([0] * num_rows, guesses, position=2**40) for _ in FORMS]
        for _ in range(4):
            found = torch.randint(0, 2, (num_rows,), generator=generator)
            for one, end_step in zip(made, FORMS, strict=True):
                end_step(found, one.sampling, one.step)
            assert made[0].numbers() == made[1].numbers() == made[2].numbers()
