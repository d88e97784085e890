"""Threads for work cut into pieces: results do not depend on how many there are; for calibration and the quantizer.

Every piece is computed by one thread alone, and pieces are cut and added up in an order that knows nothing of the
threads. torch by itself would split a sum differently for another number of threads and round it differently.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """As many threads as torch uses on this machine; a context manager, inside which torch itself uses one."""

    def __init__(self, count: int | None = None) -> None:
        self._torch_threads = torch.get_num_threads()
        self.count = count or self._torch_threads

    def __enter__(self) -> Self:
        torch.set_num_threads(1)  # threads that start from here on take this over
        self._pool = ThreadPoolExecutor(self.count, "quantizer", initializer=lambda: torch.set_num_threads(1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items; few more than one per thread are ever held."""
        remaining = iter(items)
        running: list[Future[Result]] = [self._submit(function, item) for item in islice(remaining, self.count + 1)]
        while running:
            result = running.pop(0).result()
            running.extend(self._submit(function, item) for item in islice(remaining, 1))
            yield result

    def _submit(self, function: Callable[[Item], Result], item: Item) -> "Future[Result]":
        return self._pool.submit(_without_gradients, function, item)


def _without_gradients(function: Callable[[Item], Result], item: Item) -> Result:
    with torch.no_grad():  # a setting of each thread
        return function(item)


def pieces(tensor: Tensor, num_rows: int) -> Iterator[Tensor]:
    """The tensor in views of at most so many rows. Shapes: [N, ...]."""
    return (tensor[start : start + num_rows] for start in range(0, tensor.shape[0], num_rows))


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """How torch multiplies fp32 matrices inside: "highest" keeps every bit, "high" lets CUDA use TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
