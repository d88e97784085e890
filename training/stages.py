"""What is trained when: phases of lengths, mixtures and learning rates.

For: training/train.py, training/batches.py. A stage is a list of phases; each takes its share of the stage's time.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Batches of so many samples of one length; `share` of a phase's batches are of it."""

    length: int
    batch: int
    share: float = 1.0


@dataclass(frozen=True)
class Phase:
    """Lengths and mixture; `rate` is the learning-rate factor at its start and end, `seconds` its share of the clock.

    Of the samples, `needle_share` have planted lines and `aimed_share` are aimed at the main job, the others are those
    of the first version. The loss of plain text takes every `text_every`-th id. With `average` above 0, what is saved
    is the moving average of the weights with that decay a step.
    """

    parts: tuple[Part, ...]
    seconds: float
    cut_share: float
    rate: tuple[float, float]
    text_weight: float = 0.3
    pointer_weight: float = 0.2
    selection_weight: float = 0.1
    address_weight: float = 0.0
    needle_share: float = 0.0
    aimed_share: float = 0.0
    text_every: int = 1
    average: float = 0.0


def only(length: int, batch: int) -> tuple[Part, ...]:
    """A single length."""
    return (Part(length, batch),)


MIXED = {"text_weight": 0.2, "selection_weight": 0.15, "needle_share": 0.55, "text_every": 4, "average": 0.98}
AIMED = {
    "selection_weight": 0.2,
    "address_weight": 0.3,
    "needle_share": 0.1,
    "aimed_share": 0.6,
    "text_every": 2,
    "average": 0.99,
}
STAGES = {
    "0": [
        Phase(only(512, 96), 75, 0.7, (1.0, 1.0)),
        Phase(only(2048, 24), 25, 0.6, (1.0, 1.0)),
        Phase(only(8192, 6), 15, 0.3, (0.5, 0.5)),
        Phase(only(16384, 3), 10, 0.3, (0.5, 0.5)),
    ],
    "1": [
        Phase(only(512, 96), 90, 0.7, (1.0, 1.0)),
        Phase(only(2048, 24), 130, 0.6, (1.0, 1.0), selection_weight=0.15),
        Phase(only(8192, 6), 200, 0.4, (0.8, 0.5), selection_weight=0.2),
    ],
    "2": [
        Phase(only(2048, 24), 150, 0.5, (0.6, 0.5), selection_weight=0.15),
        Phase(only(8192, 6), 165, 0.3, (0.45, 0.25), selection_weight=0.2),
        Phase(only(16384, 3), 140, 0.2, (0.25, 0.01), text_weight=0.2, pointer_weight=0.1, selection_weight=0.2),
    ],
    # From version 0 on one CPU thread: 65 minutes.
    "3": [
        Phase(only(512, 8), 1500, 0.5, (0.2, 0.14), **MIXED),
        Phase(only(2048, 2), 1500, 0.4, (0.14, 0.06), **MIXED),
        Phase(only(5120, 1), 900, 0.3, (0.06, 0.005), **MIXED),
    ],
    # The same on a GPU: 25 minutes of one H100.
    "4": [
        Phase(only(512, 96), 300, 0.6, (0.5, 0.4), **MIXED),
        Phase(only(2048, 24), 420, 0.5, (0.4, 0.3), **MIXED),
        Phase(only(8192, 6), 450, 0.3, (0.3, 0.12), **MIXED),
        Phase(only(16384, 3), 330, 0.2, (0.12, 0.005), **MIXED),
    ],
    # Aimed at the main job, from version 0 on a GPU: 14 minutes of one H100.
    "5": [
        Phase((Part(2048, 24, 0.8), Part(8192, 6, 0.2)), 340, 0.5, (0.5, 0.35), **AIMED),
        Phase((Part(2048, 24, 0.15), Part(8192, 6, 0.65), Part(16384, 3, 0.2)), 280, 0.3, (0.35, 0.12), **AIMED),
        Phase((Part(2048, 24, 0.1), Part(8192, 6, 0.3), Part(16384, 3, 0.6)), 220, 0.2, (0.12, 0.005), **AIMED),
    ],
    # The same path in small, to try the commands on a CPU.
    "small": [
        Phase((Part(384, 2, 0.8), Part(640, 1, 0.2)), 60, 0.5, (0.1, 0.07), **AIMED),
        Phase((Part(640, 1, 0.5), Part(1024, 1, 0.5)), 60, 0.3, (0.07, 0.005), **AIMED),
    ],
}
