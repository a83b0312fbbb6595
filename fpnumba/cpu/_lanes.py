"""A cache line of a row as one value, for kernels that must decide themselves in which order they touch memory.

LLVM vectorises loops that go up. A kernel that goes back in time should go down within each row as well: then memory
is read downwards all along, which hardware prefetches. Rows that are read upwards, one below the other, it takes for
many short beginnings. Reading a row in lines, the last one first, needs the line as a value of its own; it is a
vector of LLVM's, which becomes as many registers as the processor needs for it.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from fpnumba.cpu._jit import FASTMATH

LINE_BYTES = 64
# A store past the cache is one instruction only where the vector is no longer than a register
STREAM_BYTES = 32


class Lanes(types.Type):
    """As many numbers as fill a cache line."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")

    @property
    def count(self) -> int:
        """How many."""
        return LINE_BYTES * 8 // int(self.dtype.bitwidth)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        element = dmm.lookup(fe_type.dtype).get_value_type()
        super().__init__(dmm, fe_type, ir.VectorType(element, fe_type.count))


def _constant(lanes: Lanes, value: float) -> Any:
    kind = ir.FloatType() if lanes.dtype.bitwidth == 32 else ir.DoubleType()
    return ir.Constant(ir.VectorType(kind, lanes.count), [ir.Constant(kind, value)] * lanes.count)


def _splat(builder: Any, scalar: Any, count: int) -> Any:
    vector = ir.VectorType(scalar.type, count)
    i32 = ir.IntType(32)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(i32, 0))
    zeros = ir.Constant(ir.VectorType(i32, count), [ir.Constant(i32, 0)] * count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _part(builder: Any, vector: Any, begin: int, end: int) -> Any:
    i32 = ir.IntType(32)
    mask = ir.Constant(ir.VectorType(i32, end - begin), [ir.Constant(i32, k) for k in range(begin, end)])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _fold(builder: Any, vector: Any, join: Any) -> Any:
    """All lanes joined into one, half with half."""
    count = vector.type.count
    while count > 1:
        count //= 2
        vector = join(_part(builder, vector, 0, count), _part(builder, vector, count, 2 * count))
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed(">", a, b), a, b)


# Arithmetic: lanes with lanes, or with a number of the same type


def _operate(operation: Any, instruction: str) -> None:
    @infer_global(operation)
    class _Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            kinds = {a.dtype if isinstance(a, Lanes) else a for a in args}
            if len(args) == 2 and len(kinds) == 1 and any(isinstance(a, Lanes) for a in args):
                return signature(Lanes(kinds.pop()), *args)
            return None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        count = sig.return_type.count
        a, b = (
            v if isinstance(t, Lanes) else _splat(builder, v, count)
            for t, v in zip(sig.args, args, strict=True)
        )
        return getattr(builder, instruction)(a, b, flags=tuple(sorted(FASTMATH)))

    for left, right in ((Lanes, Lanes), (Lanes, types.Float), (types.Float, Lanes)):
        lower_builtin(operation, left, right)(lower)


for _operation, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _operate(_operation, _instruction)


# Memory


def _place(context: Any, builder: Any, array: Any, value: Any, at: Any) -> Any:
    return builder.gep(context.make_array(array)(context, builder, value).data, [at])


def _copy(builder: Any, to: Any, of: Any, nbytes: Any) -> None:
    cgutils.raw_memcpy(builder, to, of, nbytes, 1)


@intrinsic
def line_of(typingctx: Any, array: Any) -> Any:
    """How many numbers of `array` a line holds, known when compiled."""
    count = Lanes(array.dtype).count

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(64), count)

    return types.int64(array), codegen


@intrinsic
def no_lanes(typingctx: Any, array: Any) -> Any:
    """Zeros, of the type of `array`."""
    lanes = Lanes(array.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _constant(lanes, 0.0)

    return lanes(array), codegen


@intrinsic
def load(typingctx: Any, array: Any, at: Any, count: Any) -> Any:
    """``array.flat[at:at + count]``, and zeros beyond if that is less than a line."""
    lanes = Lanes(array.dtype)
    size = array.dtype.bitwidth // 8

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _place(context, builder, sig.args[0], args[0], args[1])
        vector = context.get_value_type(lanes)
        full = ir.Constant(ir.IntType(64), lanes.count)
        with builder.if_else(builder.icmp_signed("==", args[2], full)) as (whole, part):
            with whole:
                loaded = builder.load(builder.bitcast(place, vector.as_pointer()), align=size)
                loaded_in = builder.block
            with part:
                buffer = cgutils.alloca_once(builder, vector)
                builder.store(ir.Constant(vector, None), buffer, align=size)
                _copy(builder, buffer, place, builder.mul(args[2], ir.Constant(ir.IntType(64), size)))
                copied = builder.load(buffer, align=size)
                copied_in = builder.block
        value = builder.phi(vector)
        value.add_incoming(loaded, loaded_in)
        value.add_incoming(copied, copied_in)
        return value

    return lanes(array, types.int64, types.int64), codegen


@intrinsic
def store(typingctx: Any, array: Any, at: Any, count: Any, value: Any, stream: Any) -> Any:
    """``array.flat[at:at + count] = value``; whole lines past the cache if `stream`, see `fpnumba.cpu._jit.streams`."""
    size = array.dtype.bitwidth // 8
    lanes = STREAM_BYTES // size

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _place(context, builder, sig.args[0], args[0], args[1])
        vector = args[3]
        full = builder.icmp_signed("==", args[2], ir.Constant(ir.IntType(64), vector.type.count))
        past = builder.and_(full, builder.trunc(args[4], ir.IntType(1)))
        with builder.if_else(past) as (streamed, kept):
            with streamed:
                hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
                for begin in range(0, vector.type.count, lanes):
                    part = _part(builder, vector, begin, begin + lanes)
                    to = builder.gep(place, [ir.Constant(ir.IntType(64), begin)])
                    done = builder.store(
                        part, builder.bitcast(to, part.type.as_pointer()), align=STREAM_BYTES
                    )
                    done.set_metadata("nontemporal", hint)
            with kept, builder.if_else(full) as (whole, some):
                with whole:
                    builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=size)
                with some:
                    buffer = cgutils.alloca_once(builder, vector.type)
                    builder.store(vector, buffer, align=size)
                    _copy(builder, place, buffer, builder.mul(args[2], ir.Constant(ir.IntType(64), size)))
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, value, types.boolean), codegen


# All lanes in one number


@intrinsic
def total(typingctx: Any, value: Any) -> Any:
    """The sum of all lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _fold(builder, args[0], builder.fadd)

    return value.dtype(value), codegen


@intrinsic
def larger_bits(typingctx: Any, before: Any, value: Any) -> Any:
    """The larger, lane by lane, of `before` and the bits of ``|value|``: see `fpnumba.cpu._jit.magnitude_bits`."""
    integer = types.int32 if value.dtype.bitwidth == 32 else types.int64

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.IntType(integer.bitwidth)
        vector = ir.VectorType(kind, args[1].type.count)
        mask = ir.Constant(vector, [ir.Constant(kind, (1 << (integer.bitwidth - 1)) - 1)] * vector.count)
        return _larger(builder, args[0], builder.and_(builder.bitcast(args[1], vector), mask))

    return Lanes(integer)(Lanes(integer), value), codegen


@intrinsic
def no_bits(typingctx: Any, array: Any) -> Any:
    """What `larger_bits` starts from, for the type of `array`."""
    integer = types.int32 if array.dtype.bitwidth == 32 else types.int64

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(Lanes(integer)), None)

    return Lanes(integer)(array), codegen


@intrinsic
def largest_bits(typingctx: Any, bits: Any) -> Any:
    """The largest of all lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _fold(builder, args[0], lambda a, b: _larger(builder, a, b))

    return bits.dtype(bits), codegen
