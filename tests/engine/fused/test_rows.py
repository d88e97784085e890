"""Rows on their way into products: each form is made once, and only if a product asks for it."""

from collections.abc import Callable

import pytest
import torch

from salalocal.engine.fused import rows as rows_module
from salalocal.engine.fused.rows import MadeRows, NormedRows, PlainRows

HIDDEN = torch.randn(3, 8).bfloat16()
FORMS: dict[str, Callable[[], rows_module.Rows]] = {
    "plain": lambda: PlainRows(HIDDEN),
    "normed": lambda: NormedRows(HIDDEN, torch.ones(8).bfloat16(), 1e-6),
    "made": lambda: MadeRows(3, lambda: HIDDEN, lambda dtype: rows_module.quantize_rows(HIDDEN, dtype)),
}


@pytest.mark.parametrize("form", FORMS)
def test_maps_of_several_formats_share_the_quantized_rows(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def counted(*arguments: object) -> object:
        dtype = arguments[-1]
        assert isinstance(dtype, torch.dtype)
        calls.append(dtype)
        return object()

    for name in ("quantize_rows", "rms_norm_quantize_rows"):
        monkeypatch.setattr(rows_module, name, counted)
    rows = FORMS[form]()
    assert calls == []
    first = rows.quantized(torch.int8)
    assert rows.quantized(torch.int8) is first and calls == [torch.int8]
    assert rows.quantized(torch.float8_e4m3fn) is not first and calls == [torch.int8, torch.float8_e4m3fn]
    assert FORMS[form]().quantized(torch.int8) is not first
