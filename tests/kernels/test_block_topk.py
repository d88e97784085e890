"""Choice of blocks: the specification's rule on random and on hostile keys, whatever the chunk, the tile and the dtype.

A choice is judged in two ways: equal to the float64 definition where the margin is wide, and everywhere `is_choice`:
forced blocks, exact count, and no rejected block above a chosen one by more than the rounding of the scores.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from salalocal.kernels.block_topk import BlockGeometry, block_topk_definition, block_topk_reference
from salalocal.kernels.block_topk import reference as module
from salalocal.kernels.pooled_keys import num_pooled, pooled_keys_reference


def sizes(kernel: int, stride: int, block: int, init: int, window: int, topk: int) -> BlockGeometry:
    return BlockGeometry(
        kernel_size=kernel, kernel_stride=stride, block_size=block, init_blocks=init, window_size=window, topk=topk
    )


RELEASED = sizes(32, 16, 64, 1, 2048, 64)
SMALL = [
    sizes(8, 4, 16, 1, 32, 4),  # the released ratios
    sizes(32, 16, 64, 1, 64, 3),  # the released kernel and block
    sizes(32, 4, 8, 1, 8, 4),  # windows wider than a block: the causal rule for pooled keys decides rows
    sizes(16, 16, 16, 2, 32, 5),  # windows side by side, two init blocks
    sizes(8, 4, 8, 0, 0, 4),  # nothing forced but the row's own block
    sizes(4, 4, 4, 1, 4, 2),  # nothing left to the scores
    sizes(6, 3, 12, 1, 12, 3),  # no powers of two
]
EDGES = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 257, 300, 321]


@dataclass
class Case:
    """Inputs of one call, in float64; k1 and k2 are pooled from the keys."""

    q: Tensor
    keys: Tensor
    first: int
    geometry: BlockGeometry
    scale: float = 0.3

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]

    def pooled(self, dtype: torch.dtype, num_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        n, g = num_tokens or self.num_tokens, self.geometry
        keys = self.keys.to(dtype)
        k1 = pooled_keys_reference(
            keys, 0, num_pooled(n, g.kernel_size, g.kernel_stride), g.kernel_size, g.kernel_stride
        )
        kernel, stride = 4 * g.kernel_size, 4 * g.kernel_stride
        return k1, pooled_keys_reference(keys, 0, num_pooled(n, kernel, stride), kernel, stride)

    def choose(self, dtype: torch.dtype = torch.float64, start: int = 0, end: int | None = None) -> Tensor:
        """Blocks of rows start .. end - 1, as the call that ends with row end - 1 would choose them."""
        end = self.q.shape[1] if end is None else end
        n = self.first + end
        rows = self.q[:, start:end].to(dtype)
        return block_topk_reference(rows, *self.pooled(dtype, n), self.first + start, n, self.geometry, self.scale)

    def define(self, dtype: torch.dtype = torch.float64) -> Tensor:
        n = self.num_tokens
        return block_topk_definition(self.q.to(dtype), *self.pooled(dtype), self.first, n, self.geometry, self.scale)

    def log_scores(self, dtype: torch.dtype = torch.float64) -> np.ndarray:
        """Log of the pooled score of every block, [B, T, Hkv, blocks], in float64 from inputs rounded to dtype."""
        k1, k2 = (x.double() for x in self.pooled(dtype))
        q = self.q.to(dtype).double()
        group = q.shape[2] // k1.shape[2]
        num_blocks = (self.num_tokens - 1) // self.geometry.block_size + 1
        found = np.full((*q.shape[:2], k1.shape[2], num_blocks), -np.inf)
        sizes = oracle.Geometry(*(getattr(self.geometry, name) for name in oracle.Geometry.__dataclass_fields__))
        for b, t, g in np.ndindex(found.shape[:3]):
            heads = slice(g * group, (g + 1) * group)
            p = self.first + t
            scores = oracle.stage1_scores(
                q[b, t, heads].numpy(), k1[b, :, g : g + 1].numpy(), k2[b, :, g : g + 1].numpy(), p, sizes, self.scale
            )[0]
            with np.errstate(divide="ignore"):
                found[b, t, g] = [np.log(oracle.pool_to_block(scores, x, sizes)) for x in range(num_blocks)]
        return found


def draw(rng: random.Random, geometry: BlockGeometry, num_tokens: int, max_rows: int = 40) -> Case:
    torch.manual_seed(rng.randrange(2**31))
    rows = rng.randint(1, min(num_tokens, max_rows))
    groups, per_group, batch = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 5]), rng.choice([1, 1, 2])
    q = 3 * torch.randn(batch, rows, groups * per_group, 8, dtype=torch.float64)
    keys = torch.randn(batch, groups, num_tokens, 8, dtype=torch.float64).transpose(1, 2)
    return Case(q, keys, num_tokens - rows, geometry)


def assert_is_choice(case: Case, picks: Tensor, log_scores: np.ndarray, tolerance: float) -> None:
    """Check counts, order, forced blocks, and that scores decided up to the tolerance on their logarithm."""
    geometry = case.geometry
    assert picks.shape == (*case.q.shape[:2], case.keys.shape[2], geometry.budget)
    for b, t, g in np.ndindex(picks.shape[:3]):
        own = (case.first + t) // geometry.block_size
        row = picks[b, t, g].tolist()
        chosen = [x for x in row if x >= 0]
        assert chosen + [-1] * (geometry.budget - len(chosen)) == row
        assert len(chosen) == min(own + 1, geometry.budget)
        assert chosen == sorted(set(chosen)) and chosen[-1] == own
        forced = {x for x in range(own + 1) if x < geometry.init_blocks or x >= own - geometry.local_blocks}
        assert forced <= set(chosen)
        free = [log_scores[b, t, g, x] for x in chosen if x not in forced]
        rejected = [log_scores[b, t, g, x] for x in range(own + 1) if x not in chosen]
        if free and rejected and max(rejected) > -math.inf:
            assert min(free) >= max(rejected) - tolerance


def lowest_choice(geometry: BlockGeometry, position: int) -> list[int]:
    """What a row picks when every score is the same."""
    own = position // geometry.block_size
    if own < geometry.budget:
        return [*range(own + 1), *[-1] * (geometry.budget - own - 1)]
    return [*range(geometry.topk - 1), *range(own - geometry.local_blocks, own + 1)]


def test_released_geometry() -> None:
    assert (RELEASED.local_blocks, RELEASED.budget, RELEASED.free_blocks, RELEASED.reach) == (32, 96, 62, 6144)
    assert (RELEASED.pooled_per_block, RELEASED.overlap) == (4, 1)
    assert (RELEASED.coarse_kernel_size, RELEASED.coarse_kernel_stride) == (128, 64)


@pytest.mark.parametrize("geometry", SMALL)
def test_definition_is_the_oracle(geometry: BlockGeometry, seed: int) -> None:
    rng = random.Random(seed)
    plain = oracle.Geometry(*(getattr(geometry, name) for name in oracle.Geometry.__dataclass_fields__))
    for num_tokens in [*rng.sample(EDGES, 3), 340]:
        case = draw(rng, geometry, num_tokens, max_rows=8)
        picks = case.define()
        k1, k2 = case.pooled(torch.float64)
        for b, t in np.ndindex(picks.shape[:2]):
            arrays = (case.q[b, t].numpy(), k1[b].numpy(), k2[b].numpy())
            expected, _ = oracle.select_row(*arrays, case.first + t, plain, case.scale)
            assert [tuple(x for x in row if x >= 0) for row in picks[b, t].tolist()] == list(expected)


@pytest.mark.parametrize("geometry", SMALL)
@pytest.mark.parametrize("num_tokens", EDGES)
def test_reference_is_the_definition(geometry: BlockGeometry, num_tokens: int, seed: int) -> None:
    case = draw(random.Random(seed), geometry, num_tokens)
    assert torch.equal(case.choose(), case.define())


@pytest.mark.parametrize("geometry", SMALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-5), (torch.float16, 2e-5)])
def test_scores_are_exact_to_fp32_rounding_for_the_stored_values(
    geometry: BlockGeometry, dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    # Inputs and pooled keys are rounded to dtype; from there on only fp32 rounding may decide otherwise.
    rng = random.Random(seed)
    for num_tokens in (rng.choice(EDGES), 330):
        case = draw(rng, geometry, num_tokens, max_rows=12)
        assert_is_choice(case, case.choose(dtype), case.log_scores(dtype), tolerance)


@pytest.mark.parametrize("geometry", SMALL[:5])
def test_near_ties_are_decided_within_rounding(geometry: BlockGeometry, seed: int) -> None:
    rng = random.Random(seed)
    for spread in (1e-2, 1e-4, 1e-6):
        case = draw(rng, geometry, 330, max_rows=12)
        case.keys = case.keys[:, :1] + spread * case.keys
        assert_is_choice(case, case.choose(torch.float32), case.log_scores(torch.float32), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("geometry", SMALL)
def test_ties_go_to_the_lower_block(geometry: BlockGeometry, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    case = draw(rng, geometry, rng.randint(200, 340))
    case.keys = case.keys[:, :1].expand_as(case.keys).contiguous()
    picks = case.choose(dtype)
    for t in range(picks.shape[1]):
        lowest = lowest_choice(geometry, case.first + t)
        assert picks[:, t].tolist() == [[lowest] * picks.shape[2]] * picks.shape[0]


@pytest.mark.parametrize("geometry", [g for g in SMALL if g.init_blocks])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_repeated_blocks_tie_by_number(geometry: BlockGeometry, dtype: torch.dtype, seed: int) -> None:
    """Keys with a period of one block: every candidate that sees all its windows scores the same."""
    rng = random.Random(seed)
    case = draw(rng, geometry, 24 * geometry.block_size)
    case.keys = case.keys[:, : geometry.block_size].repeat(1, 24, 1, 1)
    for start in range(0, case.q.shape[1], 7):
        end = min(start + 7, case.q.shape[1])
        picks = case.choose(dtype, start, end)
        for t in range(start, end):
            lowest = lowest_choice(geometry, case.first + t)
            assert picks[:, t - start].tolist() == [[lowest] * picks.shape[2]] * picks.shape[0]


@pytest.mark.parametrize("geometry", SMALL)
@pytest.mark.parametrize("strength", [1e2, 1e3])
def test_one_dominating_key_does_not_hide_the_others(geometry: BlockGeometry, strength: float, seed: int) -> None:
    """Beside its windows all others vanish as plain exponentials, but not as logarithms: the ranking stays exact."""
    rng = random.Random(seed)
    case = draw(rng, geometry, 330)
    case.keys[:, rng.randrange(case.num_tokens)] = strength
    k1, k2 = case.pooled(torch.float32)
    rounded = (case.q.float().double(), k1.double(), k2.double())
    exact = block_topk_reference(*rounded, case.first, case.num_tokens, geometry, case.scale)
    num_other = (case.choose(torch.float32) != exact).any(-1).sum()
    assert num_other <= 1 + 0.01 * exact[..., 0].numel()  # two windows that hold the key may tie within rounding


@pytest.mark.parametrize("geometry", SMALL)
def test_a_huge_key_still_gives_valid_blocks(geometry: BlockGeometry, seed: int) -> None:
    rng = random.Random(seed)
    case = draw(rng, geometry, 330, max_rows=20)
    case.keys[:, rng.randrange(case.num_tokens)] = 1e30
    picks = case.choose(torch.float32)
    assert_is_choice(case, picks, np.zeros((*picks.shape[:3], 340)), 0.0)


def test_an_edge_of_the_reach_of_the_released_sizes(seed: int) -> None:
    torch.manual_seed(seed)
    num_tokens = 6144 + 64 + 130 + random.Random(seed).randrange(64)
    keys = torch.randn(1, num_tokens, 2, 4, dtype=torch.float64)
    case = Case(2 * torch.randn(1, num_tokens - 6100, 4, 4, dtype=torch.float64), keys, 6100, RELEASED)
    picks = case.choose()
    for t in (0, 43, 44, 107, 108, picks.shape[1] - 1):
        own = (6100 + t) // 64
        for row in picks[0, t].tolist():
            assert sum(x >= 0 for x in row) == min(own + 1, 96) == len({x for x in row if x >= 0})
            assert row[0] == 0 and set(range(own - 32, own + 1)) <= set(row) and max(row) == own
    rows = torch.tensor([0, 43, 44, 45, 107, 108, 109, picks.shape[1] - 1])
    for i in rows.tolist():
        one = Case(case.q[:, i : i + 1], keys[:, : 6100 + i + 1], 6100 + i, RELEASED)
        assert torch.equal(one.define(), picks[:, i : i + 1])


@pytest.mark.parametrize("geometry", [RELEASED, *(g for g in SMALL if g.kernel_size <= g.block_size and g.free_blocks)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_block_is_picked_wherever_it_is(geometry: BlockGeometry, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    for place in ("first", "last", "any"):
        case = draw(rng, geometry, geometry.reach + rng.randint(200, 340))
        blocks = (case.first - 1) // geometry.block_size
        block = {"first": 0, "last": blocks, "any": rng.randint(0, blocks)}[place]
        needle = torch.nn.functional.normalize(torch.randn(8, dtype=torch.float64), dim=0)
        case.q = case.q / 3 + 8 * needle
        case.keys[:, block * geometry.block_size : (block + 1) * geometry.block_size] += 16 * needle
        assert (case.choose(dtype) == block).any(-1).all()


@pytest.mark.parametrize("geometry", SMALL)
def test_any_chunking_chooses_the_same(geometry: BlockGeometry, seed: int) -> None:
    rng = random.Random(seed)
    case = draw(rng, geometry, 340, max_rows=340)
    whole = case.choose()
    single = case.choose(torch.float32)
    scores = case.log_scores(torch.float32) if case.q.shape[1] * case.q.shape[2] < 400 else None
    at = 0
    while at < case.q.shape[1]:
        end = min(case.q.shape[1], at + rng.choice([1, 1, 2, 15, 17, 63, 64, 65]))
        assert torch.equal(case.choose(torch.float64, at, end), whole[:, at:end])
        part = case.choose(torch.float32, at, end)
        assert (part == single[:, at:end]).double().mean() > 0.98
        if scores is not None:
            rows = Case(case.q[:, at:end], case.keys, case.first + at, geometry)
            assert_is_choice(rows, part, scores[:, at:end], 2e-5)
        at = end


@pytest.mark.parametrize("geometry", [g for g in SMALL if g.free_blocks and g.window_size])
def test_the_draft_decides_nothing_that_exact_scores_do_not(
    geometry: BlockGeometry, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys far from the origin, as a model's are, nearer and nearer to each other, and blocks that repeat."""
    rng = random.Random(seed)
    for spread in (1.0, 1e-2, 1e-4, 0.0):
        case = draw(rng, geometry, 24 * geometry.block_size)
        period = case.keys[:, : 3 * geometry.block_size].repeat(1, 8, 1, 1)
        case.keys = 30 + (period if rng.random() < 0.3 else case.keys) * spread
        drafted = case.choose(torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_has_draft", lambda *_: False)
            assert torch.equal(drafted, case.choose(torch.float32))


def test_the_draft_leaves_few_rows_of_scattered_keys_and_all_of_equal_ones(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsure: list[int] = []
    exact = module._block_scores

    def counted(q: Tensor, *rest: object) -> Tensor:
        unsure.append(q.shape[1])
        return exact(q, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_block_scores", counted)
    torch.manual_seed(seed)
    keys = 10 + torch.randn(1, 9000, 2, 8, dtype=torch.float64)
    case = Case(3 * torch.randn(1, 200, 4, 8, dtype=torch.float64), keys, 8800, RELEASED)
    case.choose(torch.float32)
    assert sum(unsure) <= 20
    unsure.clear()
    case.keys = keys[:, :1].expand_as(keys).contiguous()
    case.choose(torch.float32)
    assert sum(unsure) == 200


@pytest.mark.parametrize("geometry", SMALL)
def test_later_tokens_change_nothing(geometry: BlockGeometry, seed: int) -> None:
    rng = random.Random(seed)
    case = draw(rng, geometry, 340)
    end = case.q.shape[1] // 2 + 1
    for dtype in (torch.float64, torch.float32):
        before = case.choose(dtype, 0, end)
        rows = case.q[:, :end].to(dtype)
        k1, k2 = case.pooled(dtype)
        later = block_topk_reference(rows, k1, k2, case.first, case.num_tokens, geometry, case.scale)
        assert torch.equal(before, later)


@pytest.mark.parametrize("geometry", SMALL)
@pytest.mark.parametrize("limit", [1, 100, 3000])
def test_tile_size_does_not_matter(
    geometry: BlockGeometry, limit: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = draw(random.Random(seed), geometry, 340)
    whole, single = case.choose(), case.choose(torch.float32)
    monkeypatch.setattr(module, "MAX_TILE_SCORES", limit)
    monkeypatch.setattr(module, "MAX_DRAFT_SCORES", limit)
    monkeypatch.setattr(module, "MIN_TILE_ROWS", 3)
    assert torch.equal(case.choose(), whole)
    assert torch.equal(case.choose(torch.float32), single)


def test_a_group_depends_on_its_own_heads_and_keys_alone(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    case = Case(
        3 * torch.randn(1, 20, 6, 8, dtype=torch.float64), torch.randn(1, 330, 3, 8, dtype=torch.float64), 310, SMALL[0]
    )
    before = case.choose()
    group = rng.randrange(3)
    others = [g for g in range(3) if g != group]
    case.keys[:, :, others] = torch.randn(1, 330, 2, 8, dtype=torch.float64)
    for g in others:
        case.q[:, :, 2 * g : 2 * g + 2] = torch.randn(1, 20, 2, 8, dtype=torch.float64)
    after = case.choose()
    assert torch.equal(after[:, :, group], before[:, :, group])
    assert not torch.equal(after[:, :, others], before[:, :, others])


def test_nan_in_a_key_still_gives_valid_blocks(seed: int) -> None:
    case = draw(random.Random(seed), SMALL[0], 340, max_rows=20)
    case.keys[:, 70] = math.nan
    picks = case.choose(torch.float32)
    own = (case.first + torch.arange(picks.shape[1])) // SMALL[0].block_size
    assert (picks <= own[:, None, None]).all() and (picks[..., 1:] > picks[..., :-1]).all()


def test_misuse_is_refused(seed: int) -> None:
    case = draw(random.Random(seed), SMALL[0], 300)
    k1, k2 = case.pooled(torch.float64)
    with pytest.raises(ValueError, match="pooled keys"):
        block_topk_reference(case.q, k1[:, :-1], k2, case.first, 300, SMALL[0], 0.3)
    with pytest.raises(ValueError, match="in a sequence of"):
        block_topk_reference(case.q, k1, k2, case.first + 1, 300, SMALL[0], 0.3)
    with pytest.raises(ValueError, match="do not fit"):
        block_topk_reference(
            case.q.repeat(1, 1, 2, 1)[:, :, : 4 * k1.shape[2] + 1], k1.repeat(1, 1, 2, 1), k2, 0, 300, SMALL[0], 1
        )
    for wrong in (
        (8, 3, 16, 1, 32, 4),
        (8, 4, 18, 1, 36, 4),
        (8, 4, 16, 1, 40, 4),
        (8, 4, 16, 3, 32, 3),
        (8, 0, 16, 1, 32, 4),
    ):
        with pytest.raises(ValueError, match="kernel_size"):
            sizes(*wrong)
