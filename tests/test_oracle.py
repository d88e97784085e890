"""The oracle against itself: examples worked out by hand, and two ways to the same number."""

import math

import numpy as np
import oracle
import pytest
import small_configs

RELEASED = oracle.Geometry.of(small_configs.RELEASED["sparse_config"])
SMALL = [oracle.Geometry.of(config["sparse_config"]) for config in small_configs.CONFIGS.values()]


def test_lightning_slopes_are_the_alibi_series() -> None:
    slopes = oracle.lightning_slopes(32)
    assert slopes[[0, 1, 2, 3, 27, 31]] == pytest.approx([0.840896, 0.707107, 0.594604, 0.5, 2**-7, 2**-8], abs=1e-6)
    assert oracle.lightning_slopes(1) == pytest.approx([2**-8])
    assert oracle.lightning_slopes(6) == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert oracle.lightning_slopes(12)[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


def test_lightning_by_hand() -> None:
    ones = np.ones((3, 1, 1))
    out, state = oracle.lightning(ones, ones, ones, np.array([math.log(2)]), scale=10.0)
    assert out[:, 0, 0] == pytest.approx([10, 15, 17.5])
    assert state[0, 0, 0] == pytest.approx(1.75)
    q, k, v = (np.array([[row]], float) for row in ([1, 2], [3, 5], [7, 11, 13]))
    out, state = oracle.lightning(q, k, v, np.array([1.0]), scale=1.0)
    assert state[0].tolist() == [[21, 33, 39], [35, 55, 65]], "first axis key channel, second value channel"
    assert out[0, 0].tolist() == [91, 143, 169]


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_lightning_recurrence_is_the_chunk_form(chunk: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal((130, 3, 8)) for _ in range(3))
    slopes, scale = oracle.lightning_slopes(3), 0.3
    start = random.standard_normal((3, 8, 8))
    expected, end = oracle.lightning(q, k, v, slopes, scale, start)
    state = start.copy()
    for first in range(0, 130, chunk):
        part = slice(first, min(first + chunk, 130))
        c = part.stop - first
        for h, s in enumerate(slopes):
            qh, kh, vh = q[part, h], k[part, h], v[part, h]
            i = np.arange(c)
            decay = np.tril(np.exp(-s * np.maximum(i[:, None] - i, 0)))
            out = scale * (decay * (qh @ kh.T) @ vh + np.exp(-s * (i + 1))[:, None] * (qh @ state[h]))
            assert out == pytest.approx(expected[part, h], abs=1e-11)
            state[h] = math.exp(-s * c) * state[h] + (kh * np.exp(-s * (c - 1 - i))[:, None]).T @ vh
    assert state == pytest.approx(end, abs=1e-11)


def test_rotary_by_hand_and_by_relative_position(seed: int) -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 4)
    a, b = 3.0, 3.0 / 10.0  # theta 100: the second pair turns a tenth as fast
    expected = [
        math.cos(a) - 3 * math.sin(a),
        2 * math.cos(b) - 4 * math.sin(b),
        3 * math.cos(a) + math.sin(a),
        4 * math.cos(b) + 2 * math.sin(b),
    ]
    assert oracle.rotary(x, [3], 100.0).ravel() == pytest.approx(expected)
    assert (oracle.rotary(x, [0], 100.0) == x).all()
    random = np.random.default_rng(seed)
    q, k = random.standard_normal((2, 1, 2, 8))
    dots = [(oracle.rotary(q, [p + 5], 1e4) * oracle.rotary(k, [p], 1e4)).sum(-1) for p in (0, 17, 1000, 10**6)]
    assert np.array(dots[1:]) == pytest.approx(np.array(dots[:1] * 3), abs=1e-8)


def test_rms_norm_by_hand() -> None:
    x = np.array([[3.0, 4.0], [0.0, 0.0]])
    out = oracle.rms_norm(x, np.array([1.0, 2.0]), 1e-6)
    assert out == pytest.approx(np.array([[3, 8], [0, 0]]) / math.sqrt(12.5 + 1e-6))


def test_compressed_keys_are_complete_windows_only() -> None:
    keys = np.arange(200.0).reshape(200, 1, 1)
    for n in (0, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 127, 128, 129, 200):
        k1 = oracle.compressed_keys(keys[:n], 32, 16)
        k2 = oracle.compressed_keys(keys[:n], 128, 64)
        assert k1.shape == (max(0, (n - 32) // 16 + 1), 1, 1)
        assert k2.shape == (max(0, (n - 128) // 64 + 1), 1, 1)
        assert k1.ravel().tolist() == [16 * j + 15.5 for j in range(len(k1))]
        assert k2.ravel().tolist() == [64 * j + 63.5 for j in range(len(k2))]


def test_closed_form_of_visibility_is_brute_force() -> None:
    for p in range(1000):
        windows1 = [range(16 * j, 16 * j + 32) for j in range(70)]
        windows2 = [range(64 * j, 64 * j + 128) for j in range(20)]
        visible1 = [all(t <= p for t in window) for window in windows1]
        visible2 = [all(t <= p for t in window) for window in windows2]
        assert oracle.num_visible(p, 70, 32, 16) == max(0, (p + 1) // 16 - 1) == sum(visible1)
        assert oracle.num_visible(p, 20, 128, 64) == max(0, (p + 1) // 64 - 1) == sum(visible2)
    assert oracle.num_visible(999, 3, 32, 16) == 3, "no more than there are"


@pytest.mark.parametrize("geometry", [RELEASED, *SMALL])
def test_a_block_pools_exactly_the_windows_that_overlap_it(geometry: oracle.Geometry) -> None:
    size, stride, kernel = geometry.block_size, geometry.kernel_stride, geometry.kernel_size
    num_windows = 50
    for x in range(20):
        scores = np.zeros(num_windows)
        overlapping = [j for j in range(num_windows) if stride * j < (x + 1) * size and stride * j + kernel > x * size]
        for j in range(num_windows):
            scores[:] = 0
            scores[j] = 1
            assert (oracle.pool_to_block(scores, x, geometry) == 1) == (j in overlapping), (x, j)


def test_stage1_score_by_hand() -> None:
    geometry = oracle.Geometry(kernel_size=2, kernel_stride=1, block_size=2, init_blocks=1, window_size=2, topk=3)
    q = np.array([[1.0], [2.0], [1.0]])  # three heads, one KV head
    k1 = np.log([[[2.0]], [[3.0]], [[5.0]], [[7.0]], [[11.0]], [[13.0]], [[17.0]], [[19.0]]])
    k2 = np.log([[[10.0]]])
    p = 8  # windows 0..7 of k1 end at 1..8; the only k2 covers 0..7
    heads = [[2 / 10, 3 / 10, 5 / 10], [4 / 100, 9 / 100, 25 / 100], [2 / 10, 3 / 10, 5 / 10]]
    scores = oracle.stage1_scores(q, k1, k2, p, geometry, scale=1.0)
    assert scores[0, :3] == pytest.approx(np.sum(heads, axis=0))
    assert oracle.stage1_scores(q / 2, k1, k2, p, geometry, scale=2.0) == pytest.approx(scores)
    # One row earlier than the end of the coarse window, the fine keys give the normaliser: 2 + 3 + 5 + 7 + 11 + 13.
    early = oracle.stage1_scores(q[:1], k1, k2, 6, geometry, scale=1.0)
    assert early[0] == pytest.approx([2 / 41, 3 / 41, 5 / 41, 7 / 41, 11 / 41, 13 / 41, 0, 0])
    assert not oracle.stage1_scores(q, k1, k2, 0, geometry, scale=1.0).any()


def test_choice_by_hand_at_the_released_sizes() -> None:
    p = 8191
    scores = np.zeros(8192 // 16 - 1)
    blocks, margin = oracle.choose_blocks(scores, p, RELEASED)
    assert blocks == (*range(63), *range(95, 128)), "ties go to the lower block"
    assert margin == 0
    scores[4 * 70 + 1], scores[4 * 80 - 1] = 3.0, 2.0  # the second lies under blocks 79 and 80
    blocks, margin = oracle.choose_blocks(scores, p, RELEASED)
    assert blocks == (*range(60), 70, 79, 80, *range(95, 128))
    assert margin == 0
    scores[:] = np.linspace(2, 1, len(scores))
    blocks, margin = oracle.choose_blocks(scores, p, RELEASED)
    assert blocks == (*range(63), *range(95, 128))
    chosen, rejected = scores[4 * 62 - 1], scores[4 * 63 - 1]
    assert margin == pytest.approx((chosen - rejected) / chosen)


@pytest.mark.parametrize("geometry", [RELEASED, *SMALL])
def test_choice_keeps_its_counts(geometry: oracle.Geometry, seed: int) -> None:
    random = np.random.default_rng(seed)
    size = geometry.block_size
    for p in [*range(0, 12 * geometry.reach, max(1, geometry.reach // 40)), geometry.reach - 1, geometry.reach]:
        scores = random.random(max(0, (p + 1 - geometry.kernel_size) // geometry.kernel_stride + 1))
        blocks, _ = oracle.choose_blocks(scores, p, geometry)
        own = p // size
        assert len(blocks) == len(set(blocks)) == min(own + 1, geometry.budget)
        assert list(blocks) == sorted(blocks) and blocks[-1] == own
        assert set(range(min(geometry.init_blocks, own + 1))) <= set(blocks)
        assert set(range(max(0, own - geometry.local_blocks), own + 1)) <= set(blocks)
        tokens = oracle.tokens_of_blocks(blocks, p, size)
        assert tokens[-1] == p and len(tokens) == (len(blocks) - 1) * size + p % size + 1


def test_released_window_and_candidates() -> None:
    for p in range(6144, 9000):
        own = p // 64
        assert 2049 <= p + 1 - 64 * (own - 32) <= 2112
        assert 64 * (own - 33) + 79 <= p - 2033
        assert len(oracle.forced_blocks(p, RELEASED)) == 34
    assert (RELEASED.budget, RELEASED.local_blocks, RELEASED.reach) == (96, 32, 6144)


def test_attention_by_hand() -> None:
    k = np.array([0.0, 0.0, math.log(3)]).reshape(3, 1, 1)
    v = np.array([1.0, 2.0, 6.0]).reshape(3, 1, 1)
    q = np.array([2.0, 2.0, 2.0]).reshape(3, 1, 1)
    out = oracle.dense_attention(q, k, v, 0, scale=0.5).ravel()
    assert out == pytest.approx([1, 1.5, (1 + 2 + 18) / 5])
    picked = oracle.block_attention(q[2:], k, v, [((0, 2),)], 2, block_size=1, scale=0.5).ravel()
    assert picked == pytest.approx([(1 + 18) / 4])
    causal = oracle.block_attention(q[1:2], k, v, [((0,),)], 1, block_size=64, scale=0.5).ravel()
    assert causal == pytest.approx([1.5])


def test_switch_rules() -> None:
    assert [oracle.is_sparse_row(p, "position", 10) for p in (8, 9)] == [False, True]
    assert [oracle.is_sparse_row(p, "prompt", 10, 10) for p in (0, 9, 10)] == [True, True, True]
    assert [oracle.is_sparse_row(p, "prompt", 10, 9) for p in (0, 8, 9)] == [False, False, True]
    assert [oracle.is_sparse_row(p, "prompt", 10, 3) for p in (3, 8, 9)] == [False, False, True]
    assert oracle.is_sparse_row(0, "always", 10)


@pytest.mark.parametrize("name", ["plain", "always", "tied", "wide", "apart", "bare"])
def test_forward_is_dense_within_reach_and_causal_beyond(name: str, seed: int) -> None:
    config = small_configs.CONFIGS[name]
    geometry = oracle.Geometry.of(config["sparse_config"])
    weights = small_configs.random_weights(config, seed)
    length = geometry.reach + 3 * geometry.block_size
    tokens = small_configs.random_tokens(config, length, seed)
    never = {**config, "sparse_config": {**config["sparse_config"], "dense_len": 10**9}}
    sparse = oracle.forward(weights, config, tokens, "always").logits
    dense = oracle.forward(weights, never, tokens).logits
    assert sparse[: geometry.reach] == pytest.approx(dense[: geometry.reach], abs=1e-12)
    assert np.abs(sparse - dense)[geometry.reach :].max(axis=1).max() > 1e-3, "the selection must matter somewhere"
    shorter = oracle.forward(weights, config, tokens[:-37], "always").logits
    assert shorter == pytest.approx(sparse[:-37], abs=1e-12)


def test_released_parameter_count_from_the_table_of_names() -> None:
    shapes = small_configs.tensor_shapes(small_configs.RELEASED)
    assert len(shapes) == 395
    assert sum(math.prod(shape) for shape in shapes.values()) == 9_477_203_968
