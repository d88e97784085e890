"""Projections: arithmetic that leaves a machine projected to itself as it is, and cards found as people name them."""

import dataclasses

import pytest
from bench_cases import DEPTH, HERE, card, result

from salalocal.bench.cards import CARDS, Card, data_sheet_of, find_card, project
from salalocal.errors import RequestError

THIS = Card("this machine", 0, HERE)


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0])
def test_a_card_that_is_so_many_times_as_fast_takes_so_many_times_less(factor: float) -> None:
    projection = project(result(), DEPTH, THIS, card(factor))
    assert projection.first_token_s == pytest.approx(2.01 / factor)
    assert projection.prefill_tokens_per_s == pytest.approx(8192 / 0.4 * factor)
    assert projection.decode_tokens_per_s == pytest.approx(100 / 1.2 * factor)


def test_memory_counts_for_writing_and_products_for_reading() -> None:
    more_bandwidth = Card("card", 2**40, dataclasses.replace(HERE, read_bytes_per_s=2 * HERE.read_bytes_per_s))
    projection = project(result(), DEPTH, THIS, more_bandwidth)
    assert projection.prefill_tokens_per_s == pytest.approx(8192 / 0.4)
    assert projection.decode_tokens_per_s == pytest.approx(2 * 100 / 1.2)


def test_int8_units_help_int8_math_alone() -> None:
    more_int8 = Card("card", 2**40, dataclasses.replace(HERE, int8_flops_per_s=4 * 1.3e15))
    assert project(result("bf16"), DEPTH, THIS, more_int8).prefill_tokens_per_s == pytest.approx(8192 / 0.4)
    assert project(result("int8"), DEPTH, THIS, more_int8).prefill_tokens_per_s > 1.2 * 8192 / 0.4


def test_products_of_hopper_count_for_less_elsewhere() -> None:
    hopper, same = (dataclasses.replace(card(1), has_wgmma=True) for _ in range(2))
    assert project(result("int8"), DEPTH, hopper, same).first_token_s == pytest.approx(2.01)
    elsewhere = project(result("int8"), DEPTH, hopper, card(1))
    assert 1.1 * 2.01 < elsewhere.first_token_s < 1.5 * 2.01
    assert project(result("bf16"), DEPTH, hopper, card(1)).first_token_s == pytest.approx(2.01)
    assert elsewhere.decode_tokens_per_s == pytest.approx(100 / 1.2)  # memory counts


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        *((other, None) for other in ("NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA GH200 480GB", "Tesla T4", "")),
        *((f"NVIDIA {slower}", None) for slower in ("H100 PCIe", "H100 NVL", "A100-SXM4-40GB")),
        *((f"NVIDIA GeForce RTX {slower}", None) for slower in ("4090 Laptop GPU", "5090 D", "4080 SUPER")),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_the_data_sheet_of_this_machine_is_found(device: str, name: str | None) -> None:
    found = data_sheet_of(device)
    assert (found and found.name) == name


def test_memory_that_was_measured_says_whether_it_fits() -> None:
    assert project(result(), DEPTH, THIS, card(1, 24)).fits is True
    assert project(result(), DEPTH, THIS, card(1, 16)).fits is False
    unknown = dataclasses.replace(DEPTH, peak_memory_bytes=None)
    assert project(result(), unknown, THIS, card(1)).fits is None


def test_plain_data_says_that_it_is_a_projection() -> None:
    assert project(result(), DEPTH, THIS, card(1)).to_json()["is_projection"] is True


@pytest.mark.parametrize("name", ["RTX 5090", "rtx5090", "5090", "NVIDIA GeForce RTX 5090"])
def test_cards_are_found_as_people_name_them(name: str) -> None:
    found = find_card(name)
    assert found.name == "RTX 5090" and found.ceilings.read_bytes_per_s == 1.792e12
    assert found.ceilings.float_flops_per_s == 209.5e12 and found.ceilings.int8_flops_per_s == 838e12


@pytest.mark.parametrize("name", ["", "RTX", "RTX 9999", "50", "Ti"])
def test_other_cards_are_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        find_card(name)
    assert all(known in caught.value.hint for known in CARDS)
    assert len(caught.value.hint) < 290


def test_the_data_sheets_hang_together() -> None:
    for known in CARDS.values():
        int8 = known.ceilings.int8_flops_per_s
        assert int8 is not None and 1.9 <= int8 / known.ceilings.float_flops_per_s <= 4.1
