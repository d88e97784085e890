"""The launch settings of GEMMs: picked by card, rows and shape; none that a card cannot run."""

import pytest

from salalocal.errors import BackendError
from salalocal.kernels.int4.gemm_launch import (
    INT4_BF16_LAUNCH,
    INT4_INT8_LAUNCH,
    INT8_LAUNCH,
    GemmLaunch,
    LaunchTable,
    PerShape,
    pick_launch,
)

WIDE, DEEP, SMALL = (32_768, 4_096), (4_096, 16_384), (4_096, 4_096)


def test_settings_are_picked_by_card_and_rows() -> None:
    few, many = GemmLaunch(16, 64), GemmLaunch(128, 128)
    table: LaunchTable = {80: ((None, few),), 90: ((16, few), (None, many))}
    assert pick_launch(table, 89, 9_999, *WIDE) is few
    assert pick_launch(table, 90, 16, *DEEP) is few and pick_launch(table, 100, 17, *SMALL) is many
    with pytest.raises(BackendError, match="capability 75"):
        pick_launch(table, 75, 1, *WIDE)


def test_settings_are_picked_by_the_shape_of_the_weights() -> None:
    settings = PerShape(GemmLaunch(1, 1), GemmLaunch(2, 2), GemmLaunch(3, 3))
    table: LaunchTable = {80: ((None, settings),)}
    picked = [pick_launch(table, 80, 100, *shape) for shape in (WIDE, DEEP, SMALL, (16_384, 16_384))]
    assert [launch.rows for launch in picked] == [1, 2, 3, 1]


@pytest.mark.parametrize("table", [INT4_INT8_LAUNCH, INT4_BF16_LAUNCH, INT8_LAUNCH], ids=["int8", "bf16", "scratch"])
def test_every_table_ends_with_any_number_of_rows_and_names_the_cards_without_wgmma(table: LaunchTable) -> None:
    assert {80, 90, 120} <= table.keys()
    # tests/kernels/configurations compiles those of the int4 GEMM for sm_120 alone; only that card has a copy engine.
    assert table is INT8_LAUNCH or table[80] == table[120]
    for capability, rows in table.items():
        bounds = [most for most, _ in rows]
        assert bounds[-1] is None and bounds[:-1] == sorted(most for most in bounds if most is not None)
        if capability < 90 or (table is not INT8_LAUNCH and capability == 120):
            assert not any(pick_launch(table, capability, m, *WIDE).has_tma for m in (1, 64, 256, 9_999))
