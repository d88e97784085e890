"""A memory check for kernels that run in Triton's interpreter: import it before any kernel runs.

Every address that a load, a store or an atomic operation touches must lie within a tensor argument of the launch. A
card notices such an access only where memory happens to end, and the interpreter not at all.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
_extents: list[tuple[int, int]] = []  # of the launch that runs: first byte, and the one behind the last


def extents(arguments: Iterable[Any]) -> list[tuple[int, int]]:
    """Where the tensors among the arguments lie."""
    found: list[tuple[int, int]] = []
    for argument in arguments:
        if isinstance(argument, tuple):
            found += extents(argument)
        elif isinstance(argument, interpreter.TensorDescriptor):
            found += extents([argument.base])
        elif hasattr(argument, "data_ptr"):
            tensor = interpreter._unwrap_tensor(argument)
            if tensor.numel() > 0:
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                found.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    return found


def check(pointers: Any, mask: Any, name: str) -> None:
    """Raises: IndexError if an address that the mask lets through lies in no argument."""
    touched = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
    first = pointers.data[touched].astype(np.uint64)
    size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
    is_inside = np.zeros(first.shape, bool)
    for begin, end in _extents:
        is_inside |= (first >= np.uint64(begin)) & (first + size <= np.uint64(end))
    if not is_inside.all():
        wrong = int(first[~is_inside][0])
        lies = ", ".join(f"{wrong - begin:+,} in {end - begin:,}" for begin, end in _extents)
        raise IndexError(f"{name}: {(~is_inside).sum()} of {first.size} addresses lie in no argument; bytes: {lies}")


def checked(original: Callable[..., Any], name: str, mask_place: int) -> Callable[..., Any]:
    """An access of the builder that is checked; the mask is the argument at that place behind `self`."""

    def access(self: Any, *arguments: Any, **named: Any) -> Any:
        pointers = arguments[0] if name != "atomic" else arguments[1]
        check(pointers, arguments[mask_place], name)
        return original(self, *arguments, **named)

    return access


def noting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Notes where the tensors of a launch lie."""

    def arguments_of(self: Any, positional: Any, named: Any) -> Any:
        on_host, named_on_host = original(self, positional, named)
        _extents[:] = extents([*on_host, *named_on_host.values()])
        return on_host, named_on_host

    return arguments_of


Builder.create_masked_load = checked(Builder.create_masked_load, "load", 1)
Builder.create_masked_store = checked(Builder.create_masked_store, "store", 2)
Builder.create_atomic_rmw = checked(Builder.create_atomic_rmw, "atomic", 3)
interpreter.GridExecutor._init_args_hst = noting(interpreter.GridExecutor._init_args_hst)
