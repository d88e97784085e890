"""How the GEMMs of many rows are cut: settings by card, shape of the weights and rows, and the rule over them.

Searched on an H100 alone, as benchmarks/tune.py does, which prints such tables; those for cards without wgmma on its
mma.sync path (DISABLE_MMA_V3=1), within the 99 KiB of shared memory that RTX cards have, and not timed on such cards.
No tuning happens at run time. Records: benchmarks/results/2026-11-23-h100-tune.json, -tune-mma-sync.json.
"""

from dataclasses import dataclass
from typing import NamedTuple

from salalocal.kernels.backend import entry_of_card

_MANY_OUTPUTS, _MANY_INPUTS = 8192, 8192


@dataclass(frozen=True)
class GemmLaunch:
    """How a GEMM is cut. Units: rows of activations, columns of output, depth in input features a step.

    `programs`: up to so many for each multiprocessor are wanted; few tiles are split along K until then. `span`: so
    many row tiles take turns with one column tile, so that weights stay in the L2 cache. `walks`: so many `programs` on
    each multiprocessor take one tile after the other (the int8 GEMM alone, with the copy engine).
    """

    rows: int
    columns: int
    depth: int = 128
    num_warps: int = 4
    num_stages: int = 3
    has_tma: bool = False
    programs: int = 1
    span: int = 8
    walks: bool = False


class PerShape(NamedTuple):
    """Settings for weights [N, K]: wide with many output features, deep with few of them and many input features."""

    wide: GemmLaunch
    deep: GemmLaunch
    small: GemmLaunch


# By the oldest compute capability they hold for, then by the most rows they are for (None: any).
RowTable = tuple[tuple[int | None, GemmLaunch | PerShape], ...]
LaunchTable = dict[int, RowTable]


def pick_launch(table: LaunchTable, capability: int, num_rows: int, num_out: int, num_in: int) -> GemmLaunch:
    """The settings of a table for a product. Shapes: x [num_rows, num_in], weights [num_out, num_in].

    Raises: BackendError for a card older than all of the table.
    """
    found = next(launch for most, launch in entry_of_card(table, capability) if most is None or num_rows <= most)
    if isinstance(found, GemmLaunch):
        return found
    if num_out > _MANY_OUTPUTS:
        return found.wide
    return found.deep if num_in > _MANY_INPUTS else found.small


_INT8_MMA_SYNC: RowTable = (
    (16, GemmLaunch(16, 128, 256, 8, 3, programs=2)),
    (64, GemmLaunch(64, 64, 256, 4, 3, programs=3)),
    (
        256,
        PerShape(
            wide=GemmLaunch(64, 64, 128, 4, 4, programs=2),
            deep=GemmLaunch(64, 128, 256, 8, 3, programs=2),
            small=GemmLaunch(64, 64, 128, 4, 4, programs=2),
        ),
    ),
    (None, GemmLaunch(128, 128, 128, 8, 4, programs=2)),
)
_INT8_WGMMA: RowTable = (
    (16, GemmLaunch(16, 128, 256, 8, 3, programs=2)),
    (
        64,
        PerShape(
            wide=GemmLaunch(64, 128, 128, 8, 5, has_tma=True, programs=2),
            deep=GemmLaunch(64, 128, 128, 8, 5, has_tma=True, programs=2),
            small=GemmLaunch(64, 64, 128, 4, 4, programs=2),
        ),
    ),
    (
        256,
        PerShape(
            wide=GemmLaunch(128, 128, 128, 8, 3, has_tma=True),
            deep=GemmLaunch(256, 64, 128, 4, 3, has_tma=True, programs=2),
            small=GemmLaunch(64, 64, 256, 4, 3, programs=3),
        ),
    ),
    (
        512,
        PerShape(
            wide=GemmLaunch(128, 128, 128, 8, 3, has_tma=True),
            deep=GemmLaunch(256, 128, 128, 8, 3, has_tma=True),
            small=GemmLaunch(128, 64, 128, 4, 4, programs=2),
        ),
    ),
    (
        None,
        PerShape(
            wide=GemmLaunch(128, 128, 128, 4, 4, programs=2),
            deep=GemmLaunch(256, 128, 128, 8, 3, has_tma=True),
            small=GemmLaunch(128, 128, 128, 8, 4, programs=2),
        ),
    ),
)
_BF16_MMA_SYNC: RowTable = (
    (16, GemmLaunch(16, 64, 128, 4, 4, programs=2)),
    (
        64,
        PerShape(
            wide=GemmLaunch(64, 128, 128, 4, 4, programs=2),
            deep=GemmLaunch(64, 64, 128, 4, 4, programs=2),
            small=GemmLaunch(64, 64, 128, 4, 4, programs=2),
        ),
    ),
    (None, GemmLaunch(64, 128, 128, 4, 4, programs=2)),
)
_BF16_WGMMA: RowTable = (
    (16, GemmLaunch(16, 64, 128, 4, 4, programs=4)),
    (
        64,
        PerShape(
            wide=GemmLaunch(64, 128, 128, 8, 5, has_tma=True, programs=2),
            deep=GemmLaunch(64, 64, 128, 4, 4, programs=2),
            small=GemmLaunch(64, 64, 128, 4, 4, programs=2),
        ),
    ),
    (128, GemmLaunch(128, 128, 128, 8, 3, has_tma=True)),
    (
        None,
        PerShape(
            wide=GemmLaunch(256, 128, 128, 8, 3, has_tma=True),
            deep=GemmLaunch(256, 128, 128, 8, 3, has_tma=True),
            small=GemmLaunch(256, 64, 128, 4, 3, has_tma=True),
        ),
    ),
)
# A multiprocessor's registers hold two programs of these. Its shared memory, 164 KiB on an sm_80 and 100 KiB on RTX
# cards, should too: steps of 64 features are 19 % slower than steps of 128 where both fit twice, but one program alone
# leaves the matrix units waiting (8 warps with steps of 128 on an H100: 60 % slower).
_SCRATCH_SM_80: RowTable = ((None, GemmLaunch(128, 128, 128, 4, 3)),)
_SCRATCH_SM_86: RowTable = ((None, GemmLaunch(128, 128, 64, 4, 4)),)
_SCRATCH_SM_120: RowTable = ((None, GemmLaunch(128, 128, 64, 4, 3, has_tma=True)),)
_SCRATCH_WGMMA: RowTable = (
    (4096, GemmLaunch(128, 128, 128, 4, 3, has_tma=True, programs=2, walks=True)),  # searched at 2,048 rows
    (
        None,
        PerShape(
            wide=GemmLaunch(256, 128, 128, 8, 4, has_tma=True, walks=True),
            deep=GemmLaunch(256, 128, 128, 8, 4, has_tma=True),
            small=GemmLaunch(128, 128, 128, 4, 3, has_tma=True, programs=2, walks=True),
        ),
    ),
)

INT4_INT8_LAUNCH: LaunchTable = {80: _INT8_MMA_SYNC, 90: _INT8_WGMMA, 120: _INT8_MMA_SYNC}
INT4_BF16_LAUNCH: LaunchTable = {80: _BF16_MMA_SYNC, 90: _BF16_WGMMA, 120: _BF16_MMA_SYNC}
INT8_LAUNCH: LaunchTable = {80: _SCRATCH_SM_80, 86: _SCRATCH_SM_86, 90: _SCRATCH_WGMMA, 120: _SCRATCH_SM_120}
