"""Functions compiled by numba as XLA calls on CPU: the plumbing, and nothing else.

XLA hands a typed foreign function one pointer, to a `XLA_FFI_CallFrame` (jaxlib's
`xla/ffi/api/c_api.h`, API 0.3). numba has no notion of C structs, so fields are read at
their byte offsets, which the head of this module names. A function reads its buffers
through bare pointers: the shapes were checked when the call was traced.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

logger = logging.getLogger(__name__)

# Byte offsets, all fields eight bytes wide (an int is padded to eight).
_EXTENSION, _API, _ARGS, _RETS = 8, 16, 40, 80  # of XLA_FFI_CallFrame
_NUM_BUFFERS = 16  # XLA_FFI_Args: how many buffers
_SIZE_TO_BUFFERS = 32  # XLA_FFI_Args, XLA_FFI_Rets: the array of buffer pointers
_DATA, _DIMS = 24, 40  # of XLA_FFI_Buffer
_API_VERSION = 32  # major and minor in XLA_FFI_Api, as one word
_METADATA, _METADATA_VERSION = 24, 24  # of the extension; of XLA_FFI_Metadata

PARTS = max(10, os.cpu_count() or 1)
"""Calls that one operation is cut into. XLA's executor shares calls among its threads
once more than eight of them are ready (jaxlib 0.10.2, `kSplitThreshold`); beyond one
for each core, more calls only make programs larger and slower to load."""

FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}
"""Sums in any order, fused multiply-add; NaN and infinity keep their meaning."""

HANDLER = types.int64(types.int64)
"""Signature of a handler: the frame's address in, 0 (no error) out."""


def _load(llvm_type: ir.Type, numba_type: types.Type) -> Any:
    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        del typing_context, address

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del context, signature
            return builder.load(builder.inttoptr(args[0], llvm_type.as_pointer()))

        return numba_type(types.int64), generate

    return load


def _pointer(numba_type: types.Type) -> Any:
    pointer_type = types.CPointer(numba_type)

    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        del typing_context, address

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            llvm_type = context.get_value_type(signature.return_type)
            return builder.inttoptr(args[0], llvm_type)

        return pointer_type(types.int64), generate

    return pointer


load_i64 = _load(ir.IntType(64), types.int64)
f32_pointer = _pointer(types.float32)
i32_pointer = _pointer(types.int32)
i64_pointer = _pointer(types.int64)


@intrinsic
def float_from_bits(typing_context: Any, bits: Any) -> Any:
    """Return the f32 whose bit pattern is an i32."""
    del typing_context, bits

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def data(typing_context: Any, array: Any) -> Any:
    """Return a bare pointer to a contiguous array, which has to outlive it.

    Elements of an array are reached by way of a test for negative places, which keeps
    loops from becoming vectors; those of a pointer are not.
    """
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        return context.make_array(kind)(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), generate


@intrinsic
def floor(typing_context: Any, x: Any) -> Any:
    """Return the largest whole f32 that is not above `x`; numba's goes by i64."""
    del typing_context, x

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        function = builder.module.declare_intrinsic("llvm.floor", [ir.FloatType()])
        return builder.call(function, args)

    return types.float32(types.float32), generate


@numba.njit
def answers_query(frame: int) -> bool:
    """Answer XLA's question for the API version; return whether that was the call."""
    extension = load_i64(frame + _EXTENSION)
    if extension == 0:
        return False
    metadata = load_i64(extension + _METADATA)
    version = load_i64(load_i64(frame + _API) + _API_VERSION)
    i64_pointer(metadata + _METADATA_VERSION)[0] = version
    return True


@numba.njit
def _buffer(frame: int, operands: int, index: int) -> int:
    return load_i64(load_i64(frame + operands + _SIZE_TO_BUFFERS) + 8 * index)


@numba.njit
def num_arguments(frame: int) -> int:
    """Return how many arguments a call has."""
    return load_i64(frame + _ARGS + _NUM_BUFFERS)


@numba.njit
def argument(frame: int, index: int) -> int:
    """Return the address of an argument's elements."""
    return load_i64(_buffer(frame, _ARGS, index) + _DATA)


@numba.njit
def argument_dim(frame: int, index: int, axis: int) -> int:
    """Return one dimension of an argument."""
    return load_i64(load_i64(_buffer(frame, _ARGS, index) + _DIMS) + 8 * axis)


@numba.njit
def result(frame: int, index: int) -> int:
    """Return the address of a result's elements."""
    return load_i64(_buffer(frame, _RETS, index) + _DATA)


@numba.njit
def result_dim(frame: int, index: int, axis: int) -> int:
    """Return one dimension of a result."""
    return load_i64(load_i64(_buffer(frame, _RETS, index) + _DIMS) + 8 * axis)


def parts(units: int, most: int = PARTS) -> Iterator[tuple[int, int]]:
    """Yield (first unit, units) of each call, at most `most` of about equal size."""
    size, larger = divmod(units, min(units, most))
    first = 0
    while first < units:
        count = size + (larger > 0)
        larger -= 1
        yield first, count
        first += count


def register(name: str, handler: Callable[[int], int]) -> None:
    """Compile a handler, or read it from the cache, and make it an XLA target.

    A second call for the same name does nothing.
    """
    with _LOCK:
        if name in _REGISTERED:
            return
        compiled = _compiled(handler)
        pointer = ctypes.cast(compiled.address, ctypes.CFUNCTYPE(None))
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(pointer), platform="cpu")
        _REGISTERED[name] = compiled


def _compiled(handler: Callable[[int], int]) -> Any:
    try:
        return numba.cfunc(HANDLER, cache=True, nopython=True)(handler)
    except Exception as error:  # numba unpickles what it finds, whatever that is
        logger.warning(
            "cannot use numba's cache in %s (%s: %s); compiling without it",
            *(numba.config.CACHE_DIR, type(error).__name__, error),
        )
        return numba.cfunc(HANDLER, nopython=True)(handler)


_LOCK = threading.Lock()

_REGISTERED: dict[str, Any] = {}
"""Compiled handlers, kept for good: XLA holds bare pointers to their code."""
