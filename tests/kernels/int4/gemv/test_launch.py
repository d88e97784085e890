"""The rule that chooses launches: something for every product that is taken, made to fit its shape."""

import pytest

from salalocal.kernels.int4.gemv.launch import (
    LAUNCH,
    MAX_WORD_TOKENS,
    GemvShape,
    StreamLaunch,
    TileLaunch,
    WordLaunch,
    choose_launch,
    fitted,
)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120, 75])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_product_has_a_launch_that_fits(capability: int, group_size: int) -> None:
    for N, K in ((32768, 4096), (4096, 16384), (4096, 4096), (250, 1408)):
        for math, bits in (("int8", 4), ("float", 4), ("int8", 8)):
            for num_tokens in range(1, 17):
                launch = choose_launch(capability, math, num_tokens, GemvShape(N, K, bits, group_size))
                if isinstance(launch, StreamLaunch):
                    assert math == "int8" and bits == 4 and K & (K - 1) == 0 and K // 8 % launch.span == 0
                elif isinstance(launch, WordLaunch):
                    assert math == "int8" and K * bits // 32 % launch.words == 0 and launch.words >= 4
                else:
                    assert 1 <= launch.split <= K // group_size
                    assert math == "float" or group_size >= 64


def test_a_measured_shape_has_its_own_launch() -> None:
    for capability, table in LAUNCH.items():
        for (math, bits, tokens), by_shape in table.items():
            assert None in by_shape or math == "raw"
            for shape, launch in by_shape.items():
                if shape is not None:
                    wanted = GemvShape(*shape, bits, 128)
                    assert choose_launch(capability, math, tokens, wanted) == fitted(launch, wanted)
                if not isinstance(launch, TileLaunch):
                    assert tokens <= MAX_WORD_TOKENS


def test_a_shape_that_was_not_measured_takes_the_launch_of_one_like_it() -> None:
    def choose(N: int, K: int) -> object:
        return choose_launch(90, "int8", 1, GemvShape(N, K, 4, 128))

    by_shape = LAUNCH[90]["int8", 4, 1]
    assert choose(28672, 5120) == fitted(by_shape[32768, 4096], GemvShape(28672, 5120, 4, 128))
    assert choose(5120, 13824) == fitted(by_shape[4096, 16384], GemvShape(5120, 13824, 4, 128))
    assert choose(256, 1024) == fitted(by_shape[None], GemvShape(256, 1024, 4, 128))


def test_a_product_quantizes_itself_where_that_was_measured_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = StreamLaunch(8, 128, 8, 2, ahead=3)
    monkeypatch.setitem(LAUNCH[90], ("raw", 4, 1), {(32768, 4096): stream})
    shape = GemvShape(32768, 4096, 4, 128)
    assert choose_launch(90, "raw", 1, shape) == stream
    for other, tokens in ((shape, 2), (GemvShape(4096, 4096, 4, 128), 1), (GemvShape(32768, 5120, 4, 128), 1)):
        assert choose_launch(90, "raw", tokens, other) == choose_launch(90, "int8", tokens, other)


def test_a_launch_is_cut_to_the_row() -> None:
    assert fitted(WordLaunch(2, 512, 2), GemvShape(64, 11008, 4, 128)) == WordLaunch(2, 32, 2)
    assert fitted(StreamLaunch(4, 512, 4, 2), GemvShape(64, 1024, 4, 128)) == StreamLaunch(4, 128, 4, 2)
    assert fitted(TileLaunch(64, 4, 3, 8), GemvShape(64, 512, 4, 128)) == TileLaunch(64, 4, 3, 2)
