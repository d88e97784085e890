"""Workers give results in order, hold few of them, and leave torch as they found it."""

import threading

import pytest
import torch

from salalocal.quant.workers import Workers, matmul_precision, pieces


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_order_and_few_are_held(count: int) -> None:
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        return number * number

    with Workers(count) as workers:
        results = workers.map(work, range(40))
        assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
        assert len(started) <= 5 + count + 1
        assert list(results) == [n * n for n in range(5, 40)]


def test_every_thread_computes_alone_and_without_gradients() -> None:
    before = torch.get_num_threads()
    barrier = threading.Barrier(3, timeout=20)

    def work(_: int) -> tuple[int, bool]:
        barrier.wait()
        return torch.get_num_threads(), torch.is_grad_enabled()

    with Workers(3) as workers:
        assert torch.get_num_threads() == 1
        assert list(workers.map(work, range(3))) == [(1, False)] * 3
    assert torch.get_num_threads() == before and torch.is_grad_enabled()


def test_a_failure_comes_out_and_stops_the_rest() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 2:
            raise KeyError(number)
        done.append(number)

    with pytest.raises(KeyError), Workers(1) as workers:
        list(workers.map(work, range(100)))
    assert len(done) < 8


def test_pieces_are_views_that_cover_the_whole() -> None:
    whole = torch.arange(21).view(7, 3)
    cut = list(pieces(whole, 3))
    assert [len(piece) for piece in cut] == [3, 3, 1] and torch.equal(torch.cat(cut), whole)
    assert cut[0].data_ptr() == whole.data_ptr()


def test_precision_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    for other in ("high", "highest"):
        with pytest.raises(KeyError), matmul_precision(other):
            assert torch.get_float32_matmul_precision() == other
            raise KeyError(other)
        assert torch.get_float32_matmul_precision() == before
