"""What other cards promise, and what a measured run would be there: a result and a card come in, a projection goes out.

    projected seconds = seconds measured here * seconds_at_least(work) there / seconds_at_least(work) here

Both by data sheets; where this machine's is not known, by the ceilings that it was measured to have. A projection is
arithmetic, not a measurement: it takes for granted that kernels reach the same share of the rates there. One thing is
known better: a Hopper card has product instructions of its own, so int8 products count there for what they reached on
a Hopper card with those that all cards have.
Units: bytes, bytes a second; FLOP a second of dense matrix products, bf16 with sums in fp32, and int8.
Source: NVIDIA's data sheets and architecture papers (Ampere GA102, Ada, Hopper, Blackwell RTX).
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

from salalocal.bench.ceilings import Ceilings
from salalocal.bench.walk import DepthResult, SubjectResult
from salalocal.bench.work import Work
from salalocal.engine.prefill import chunk_ends
from salalocal.errors import RequestError

_GIB, _GIGA, _TERA = 2**30, 1e9, 1e12

# int8 products on an H100 by mma.sync over those by wgmma: 836 to 916 TFLOP/s over 1,310, see benchmarks/LOG.md.
_INT8_SHARE_WITHOUT_WGMMA = 0.67


@dataclass(frozen=True)
class Card:
    """A card by its data sheet. `has_wgmma`: it multiplies by Hopper's instructions."""

    name: str
    memory_bytes: int
    ceilings: Ceilings
    has_wgmma: bool = False


def _card(
    name: str, memory_gib: int, gigabytes_per_s: float, bf16_tflops: float, int8_tops: float, has_wgmma: bool = False
) -> Card:
    rate = gigabytes_per_s * _GIGA
    ceilings = Ceilings(rate, rate, bf16_tflops * _TERA, "bfloat16", int8_tops * _TERA)
    return Card(name, memory_gib * _GIB, ceilings, has_wgmma)


CARDS = {
    card.name: card
    for card in (
        _card("RTX 3060", 12, 360, 25.5, 102),
        _card("RTX 3090", 24, 936, 71, 284),
        _card("RTX 4060 Ti", 16, 288, 44.1, 176.5),
        _card("RTX 4080", 16, 717, 97.5, 390),
        _card("RTX 4090", 24, 1008, 165.2, 660.6),
        _card("RTX 5060 Ti", 16, 448, 47.4, 189.8),
        _card("RTX 5070 Ti", 16, 896, 87.9, 351.5),
        _card("RTX 5080", 16, 960, 112.6, 450.2),
        _card("RTX 5090", 32, 1792, 209.5, 838),
        _card("RTX A6000", 48, 768, 154.8, 309.7),
        _card("L4", 24, 300, 121, 242),
        _card("L40S", 48, 864, 362, 733),
        _card("A100", 80, 2039, 312, 624),
        _card("H100", 80, 3350, 989, 1979, has_wgmma=True),
        _card("H200", 141, 4800, 989, 1979, has_wgmma=True),
    )
}


# Where a name has more to it than the maker: of the variants, the one that the data sheet is of.
_DEVICE_NAMES = {"A100": "NVIDIA A100-SXM4-80GB", "H100": "NVIDIA H100 80GB HBM3"}


@dataclass(frozen=True)
class Projection:
    """One depth on another card, by arithmetic. Units: seconds, tokens a second; `fits` by the memory measured here."""

    card: str
    subject: str
    num_tokens: int
    first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    fits: bool | None

    def to_json(self) -> dict[str, Any]:
        """As plain data, which says what it is."""
        return {
            "is_projection": True,
            "gpu_info": self.card,
            "model_filename": self.subject,
            "n_depth": self.num_tokens,
            "ttft_s": self.first_token_s,
            "prefill_ts": self.prefill_tokens_per_s,
            "decode_ts": self.decode_tokens_per_s,
            "fits_memory": self.fits,
        }


def find_card(name: str) -> Card:
    """The card of that name, spelled as people do: `RTX 5090`, `rtx5090`, `5090`. Raises: RequestError."""
    wanted = _letters(name)
    found = [card for card in CARDS.values() if wanted and _letters(card.name) in (wanted, f"rtx{wanted}")]
    if not found:
        raise RequestError(f"--project {name[:40]!r}: no figures of that card", f"known are {', '.join(CARDS)}")
    return found[0]


def _letters(name: str) -> str:
    return "".join(c for c in name.lower().replace("nvidia", "").replace("geforce", "") if c.isalnum())


def data_sheet_of(device_name: str) -> Card | None:
    """The card whose full name a device has, `NVIDIA H100 80GB HBM3`; None for others, such as slower variants."""
    return next((card for card in CARDS.values() if _device_name(card.name) == device_name), None)


def _device_name(card_name: str) -> str:
    """As drivers spell it."""
    is_geforce = card_name.startswith("RTX ") and card_name[4].isdigit()
    return _DEVICE_NAMES.get(card_name, f"NVIDIA {'GeForce ' * is_geforce}{card_name}")


def project(result: SubjectResult, depth: DepthResult, here: Card, card: Card) -> Projection:
    """What this depth, measured on the card `here`, would be on that card."""
    cost, math = result.cost, result.facts.math
    rates = card.ceilings
    if here.has_wgmma and not card.has_wgmma and rates.int8_flops_per_s is not None:
        rates = replace(rates, int8_flops_per_s=rates.int8_flops_per_s * _INT8_SHARE_WITHOUT_WGMMA)

    def ratio(works: list[Work]) -> float:
        """How many times longer that card takes at least than this machine."""
        there = sum(rates.seconds_at_least(work, math) for work in works)
        return there / sum(here.ceilings.seconds_at_least(work, math) for work in works)

    ends = list(chunk_ends(0, depth.num_tokens, result.facts.chunk_size))
    reading = [cost.read(start, end) for start, end in itertools.pairwise([0, *ends])]
    last = [cost.read(depth.chunk_end - depth.chunk_tokens, depth.chunk_end)]
    step = ratio([cost.step(depth.num_tokens)])
    return Projection(
        card=card.name,
        subject=result.facts.name,
        num_tokens=depth.num_tokens,
        first_token_s=depth.read_s * ratio(reading) + depth.drawn.first_s * step,
        prefill_tokens_per_s=depth.chunk_tokens / (depth.chunk_s * ratio(last)),
        decode_tokens_per_s=1 / (depth.token_s * step),
        fits=None if depth.peak_memory_bytes is None else depth.peak_memory_bytes <= card.memory_bytes,
    )
