"""Products of small matrices, by tiles that stay in registers.

A compiler that is given three loops over two 16 x 16 matrices reads and writes the result for every term of every sum.
Here a tile of 4 rows and two vectors of columns is summed up in 8 registers, and what is left over at the edges goes
the plain way.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fpnumba.cpu._jit import kernel

# Rows of a tile; vectors in a row of it; bytes of a vector.
ROWS, VECTORS, BYTES = 4, 2, 32


@intrinsic
def tile(
    typingctx: Any,
    a: Any,
    at_a: Any,
    row_step: Any,
    inner_step: Any,
    inner: Any,
    b: Any,
    at_b: Any,
    b_step: Any,
    scale: Any,
    c: Any,
    at_c: Any,
    c_step: Any,
) -> Any:
    """``C += scale A B`` for one tile of ``C``; arrays are flat, with the index of the first element and steps."""
    number = c.dtype
    if not isinstance(number, types.Float) or a.dtype != number or b.dtype != number:
        return None
    size = number.bitwidth // 8
    lanes = BYTES // size

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scalar = context.get_data_type(number)
        vector, index = ir.VectorType(scalar, lanes), ir.IntType(64)
        mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)

        def data(which: int) -> Any:
            return context.make_array(signature.args[which])(context, builder, args[which]).data

        of_a, of_b, of_c = data(0), data(5), data(9)
        (_, at_a, row_step, inner_step, inner, _, at_b, b_step, scale, _, at_c, c_step) = args

        def spread(value: Any) -> Any:
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(index, 0))
            return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)

        def times_plus(x: Any, y: Any, z: Any) -> Any:
            return builder.fadd(builder.fmul(x, y, flags=("contract",)), z, flags=("contract",))

        def words(base: Any, at: Any) -> list[Any]:
            begin = builder.bitcast(builder.gep(base, [at]), vector.as_pointer())
            return [builder.gep(begin, [ir.Constant(index, k)]) for k in range(VECTORS)]

        zero = ir.Constant(vector, None)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(VECTORS)] for _ in range(ROWS)]
        with cgutils.for_range_slice(builder, ir.Constant(index, 0), inner, ir.Constant(index, 1)) as (k, _):
            right = [
                builder.load(word, align=size)
                for word in words(of_b, builder.add(at_b, builder.mul(k, b_step)))
            ]
            for r in range(ROWS):
                place = builder.add(at_a, builder.mul(k, inner_step))
                place = builder.add(place, builder.mul(ir.Constant(index, r), row_step))
                left = spread(builder.load(builder.gep(of_a, [place])))
                for total, value in zip(sums[r], right, strict=True):
                    builder.store(times_plus(left, value, builder.load(total)), total)
        factor = spread(scale)
        for r in range(ROWS):
            row = builder.add(at_c, builder.mul(ir.Constant(index, r), c_step))
            for word, total in zip(words(of_c, row), sums[r], strict=True):
                old = builder.load(word, align=size)
                builder.store(times_plus(factor, builder.load(total), old), word, align=size)
        return context.get_dummy_value()

    number_type, i64 = number, types.int64
    signature = types.void(a, i64, i64, i64, i64, b, i64, i64, number_type, c, i64, i64)
    return signature, codegen


@kernel
def add_product(a, at_a, row_step, inner_step, rows, inner, b, at_b, columns, scale, c, at_c):
    """``C += scale A B``: ``A[i, l] = a.flat[at_a + i row_step + l inner_step]``; ``B (inner, columns)`` and ``C (rows,
    columns)`` stand contiguously in ``b.flat`` and ``c.flat``."""
    width = VECTORS * BYTES // c.itemsize
    whole = columns // width * width
    full = rows // ROWS * ROWS
    for i in range(0, full, ROWS):
        for j in range(0, whole, width):
            tile(
                a,
                at_a + i * row_step,
                row_step,
                inner_step,
                inner,
                b,
                at_b + j,
                columns,
                scale,
                c,
                at_c + i * columns + j,
                columns,
            )
    for i in range(rows):
        first = whole if i < full else 0
        for l in range(inner):
            weight = scale * element(a, at_a + i * row_step + l * inner_step)
            for j in range(first, columns):
                add_to(c, at_c + i * columns + j, weight * element(b, at_b + l * columns + j))


@intrinsic
def element(typingctx: Any, a: Any, at: Any) -> Any:
    """``a.flat[at]`` of a contiguous array of any dimensions."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load(builder.gep(data, [args[1]]))

    return a.dtype(a, types.int64), codegen


@intrinsic
def add_to(typingctx: Any, a: Any, at: Any, value: Any) -> Any:
    """``a.flat[at] += value``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        place = builder.gep(data, [args[1]])
        builder.store(builder.fadd(builder.load(place), args[2]), place)
        return context.get_dummy_value()

    return types.void(a, types.int64, a.dtype), codegen
