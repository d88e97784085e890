"""Stages: rates that only fall, lengths that lightning attention can take, batches of one size, whole mixtures."""

from itertools import pairwise

import pytest

from training.model import CHUNK
from training.stages import STAGES, Phase


@pytest.mark.parametrize("phase", [phase for phases in STAGES.values() for phase in phases])
def test_a_phase_can_be_run(phase: Phase) -> None:
    assert all(part.length % CHUNK == 0 for part in phase.parts)
    assert sum(part.share for part in phase.parts) == pytest.approx(1.0)
    assert phase.needle_share + phase.aimed_share <= 1.0
    assert phase.rate[0] >= phase.rate[1] > 0.0


def test_the_aimed_stage_ends_where_it_can_stay_and_keeps_its_batches_equal() -> None:
    phases = STAGES["5"]
    assert {part.length * part.batch for phase in phases for part in phase.parts} == {49152}
    assert all(one.rate[1] == two.rate[0] for one, two in pairwise(phases))
    assert phases[-1].rate[1] < 0.01
