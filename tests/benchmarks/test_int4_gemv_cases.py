"""The cases of the search for launches: by name, in parts, and none twice."""

from benchmarks.int4_gemv_cases import LAYERS, candidates, cases, chosen_cases


def test_cases_are_chosen_by_what_they_hold() -> None:
    def names(chosen: str) -> list[tuple[str, str, int]]:
        return [(layer.name, kind, tokens) for layer, kind, tokens in chosen_cases(chosen)]

    everything = [(layer.name, kind, tokens) for layer, kind, tokens in cases()]
    assert names("") == everything and len(set(everything)) == len(everything)
    assert names("o int8 16,down raw") == [("down", "raw", 1), ("o", "int8", 16)]
    assert {tokens for _, _, tokens in names("gate_up int8 1")} == {1}  # not 16
    assert names("no such case") == []


def test_every_case_has_launches_to_try() -> None:
    assert {layer.name for layer, _, _ in cases()} == {layer.name for layer in LAYERS}
    assert all(candidates(layer, kind, tokens) for layer, kind, tokens in cases())
