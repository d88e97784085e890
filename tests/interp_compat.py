"""Repairs of Triton's interpreter, for tests without a GPU: import it before any kernel runs.

The interpreter keeps bfloat16 as raw 16-bit integers and does integer arithmetic on them, so everything in bfloat16
except load, widening and store comes out wrong. Here every operation on bfloat16 is done in float32 and rounded to the
nearest even, as a GPU does. Checked with Triton 3.6 and 3.7.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def is_bfloat(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def is_float8(kind: Any) -> bool:
    return bool(kind.primitive_bitwidth == 8 and kind.is_floating())


def widened(handle: Any) -> np.ndarray:
    """A handle's values, bfloat16 as float32."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if is_bfloat(handle) else handle.data


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to the nearest even; a NaN stays one."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def result(values: np.ndarray) -> Any:
    """What an operation on bfloat16 gives: a truth value or a bfloat16."""
    return Handle(values, tl.int1) if values.dtype == bool else Handle(narrowed(values), tl.bfloat16)


def dot_operand(handle: Any) -> np.ndarray:
    if is_float8(handle.dtype.scalar):
        half = interpreter._convert_float(handle.data, handle.dtype.scalar, tl.float16, None)
        return half.view(np.float16).astype(np.float32)
    return widened(handle).astype(np.float32)


def dot(self: Any, a: Any, b: Any, into: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    if a.dtype.scalar.is_int():  # exact in float64, where numpy has a fast product
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return Handle((product + into.data).astype(into.data.dtype), into.dtype.scalar)
    product = np.matmul(dot_operand(a), dot_operand(b))
    if is_bfloat(into):
        return Handle(narrowed(product + widened(into)), tl.bfloat16)
    return Handle((product + into.data).astype(into.data.dtype), into.dtype.scalar)


def casting(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, target: Any, *rest: Any) -> Any:
        old, new = source.dtype.scalar, target.scalar
        if old == new or tl.bfloat16 not in (old, new) or is_float8(old) or is_float8(new):
            return original(self, source, target, *rest)
        values = widened(source)
        if new == tl.bfloat16:
            return Handle(narrowed(values.astype(np.float32)), new)
        return Handle(values.astype(interpreter._get_np_dtype(target)), new)

    return cast


def binary(original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, left: Any, right: Any, op: Any) -> Any:
        if is_bfloat(left) and is_bfloat(right):
            return result(op(widened(left), widened(right)))
        return original(self, left, right, op)

    return operation


def unary(original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, value: Any, op: Any) -> Any:
        return result(op(widened(value))) if is_bfloat(value) else original(self, value, op)

    return operation


def ternary(original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, first: Any, second: Any, third: Any, op: Any) -> Any:
        if op is np.where or not is_bfloat(third):
            return original(self, first, second, third, op)
        return result(op(widened(first), widened(second), widened(third)))

    return operation


def patching(original: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a tensor of one element serve as a loop bound, which Triton 3.6 does not with newer numpy."""

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: operator.index(self.handle.data.item()))

    return patch


Builder.create_dot = dot
Builder.get_bf16 = lambda self, value: Handle(narrowed(np.array([value], np.float32)), tl.bfloat16)
Builder.cast_impl = casting(Builder.cast_impl)
Builder.create_fp_to_fp = casting(Builder.create_fp_to_fp)
Builder.binary_op = binary(Builder.binary_op)
Builder.unary_op = unary(Builder.unary_op)
Builder.ternary_op = ternary(Builder.ternary_op)
interpreter._patch_lang_tensor = patching(interpreter._patch_lang_tensor)
