"""What LLVM is told by hand: products of weight rows with activations, sums, exp, atomics.

numba compiles plain loops well but not these: a block of dot products whose accumulators must stay
in registers, bf16 and int8 weights widened on the way, and the barrier between threads. Addresses
and strides are bytes. Sums run in the same order for every block shape, so a token's result does
not depend on how many others are computed beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir as untyped_ir
from numba import types
from numba.core.extending import intrinsic

# llvmlite says nothing of its types.
ir: Any = untyped_ir
Value = Any

# Weight formats, as the kernels see them.
FLOAT32, BFLOAT16, INT8 = 0, 1, 2

_FEATURES = llvm.get_host_cpu_features()
# Floats per vector: an AVX-512 register, else two of half the width or four of a quarter.
LANES = 16 if _FEATURES.get("avx512f") else 8
HAS_TILES = bool(_FEATURES.get("amx-tile") and _FEATURES.get("amx-bf16"))

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_ELEMENT = {FLOAT32: _F32, BFLOAT16: _I16, INT8: _I8}
_BYTES = {FLOAT32: 4, BFLOAT16: 2, INT8: 1}
_FAST = ("contract", "nsz")


def _const(value: int) -> Value:
    return ir.Constant(_I64, value)


def _call(builder: Value, name: str, result: Value, args: Sequence[Value]) -> Value:
    """Calls an LLVM intrinsic by its full name."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, kind, name)
    return builder.call(function, args)


def _fma(builder: Value, a: Value, b: Value, c: Value) -> Value:
    return _call(builder, f"llvm.fma.v{LANES}f32", _VECTOR, [a, b, c])


def _splat(builder: Value, value: Value) -> Value:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_I32, 0))
    mask = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), mask)


def _widen(builder: Value, raw: Value, kind: int) -> Value:
    """A vector of stored elements as floats."""
    if kind == FLOAT32:
        return raw
    wide = ir.VectorType(_I32, LANES)
    if kind == BFLOAT16:
        shift = ir.Constant(wide, [16] * LANES)
        return builder.bitcast(builder.shl(builder.zext(raw, wide), shift), _VECTOR)
    return builder.sitofp(builder.sext(raw, wide), _VECTOR)


def _tail_mask(builder: Value, left: Value) -> Value:
    """True in the first `left` lanes."""
    lanes = ir.Constant(ir.VectorType(_I32, LANES), list(range(LANES)))
    count = builder.trunc(left, _I32)
    vector = ir.VectorType(_I32, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), count, ir.Constant(_I32, 0))
    mask = ir.Constant(vector, [0] * LANES)
    many = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)
    return builder.icmp_signed("<", lanes, many)


def _load(builder: Value, address: Value, kind: int, mask: Value | None = None) -> Value:
    """A vector of floats from `address`; lanes that the mask leaves out are 0 and not touched."""
    stored = ir.VectorType(_ELEMENT[kind], LANES)
    pointer = builder.inttoptr(address, stored.as_pointer())
    if mask is None:
        raw = builder.load(pointer, align=_BYTES[kind])
    else:
        suffix = {FLOAT32: "f32", BFLOAT16: "i16", INT8: "i8"}[kind]
        zero = ir.Constant(stored, None)
        align = ir.Constant(_I32, _BYTES[kind])
        name = f"llvm.masked.load.v{LANES}{suffix}.p0"
        raw = _call(builder, name, stored, [pointer, align, mask, zero])
    return _widen(builder, raw, kind)


def _fetch(builder: Value, address: Value) -> None:
    """Asks for the cache line at `address`, which need not be memory of ours."""
    pointer = builder.inttoptr(address, _I8.as_pointer())
    # For reading, to the nearest cache, of data.
    how = [ir.Constant(_I32, value) for value in (0, 3, 1)]
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *how])


def _pairwise(builder: Value, vectors: list[Value]) -> Value:
    """A vector whose lane i is the sum of all lanes of the i-th of up to LANES vectors, neighbours
    first: at each level two vectors become one, its halves the sums of neighbouring lanes."""
    level = vectors + [ir.Constant(_VECTOR, None)] * (LANES - len(vectors))
    wide = ir.VectorType(_I32, LANES)
    even = ir.Constant(wide, list(range(0, 2 * LANES, 2)))
    odd = ir.Constant(wide, list(range(1, 2 * LANES, 2)))
    while len(level) > 1:
        level = [
            builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd))
            for a, b in zip(level[::2], level[1::2], strict=True)
        ]
    return level[0]


def _loop(builder: Value, stop: Value, step: int, carried: list[Value], body) -> list[Value]:
    """for i in range(0, stop, step): carried = body(i, carried)."""
    before = builder.block
    head = builder.append_basic_block("head")
    inside = builder.append_basic_block("inside")
    after = builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_I64)
    index.add_incoming(_const(0), before)
    values = []
    for value in carried:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        values.append(phi)
    builder.cbranch(builder.icmp_signed("<", index, stop), inside, after)
    builder.position_at_end(inside)
    new = body(index, values)
    index.add_incoming(builder.add(index, _const(step)), builder.block)
    for phi, value in zip(values, new, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def _outlined(name: str, num_args: int, build: Callable[..., None]):
    """The body of an intrinsic of int64 arguments, as a function of its own that is never inlined:
    it is called from many places and would take long to compile in all of them."""

    def codegen(context, builder, signature, args):
        module = builder.module
        function = module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [_I64] * num_args)
            function = ir.Function(module, kind, name)
            function.linkage = "linkonce_odr"
            function.attributes.add("noinline")
            inside = ir.IRBuilder(function.append_basic_block("entry"))
            build(inside, *function.args)
            inside.ret_void()
        builder.call(function, args)
        return context.get_dummy_value()

    return codegen


def _make_dots(num_rows: int, num_inputs: int, kind: int, *, bytes_ahead: int = 0):
    """dots(w, w_stride, x, x_stride, size, scales, out, out_stride).

    out[m, n] = sum_i w[n, i] x[m, i], times scales[n] for int8 weights; x and out are fp32.
    With `bytes_ahead`, what lies so far behind is asked for meanwhile: worth it where weights come
    from memory and are read one row after the other.
    """

    def build(builder, w, w_stride, x, x_stride, size, scales, out, out_stride):
        rows = [builder.add(w, builder.mul(w_stride, _const(n))) for n in range(num_rows)]
        inputs = [builder.add(x, builder.mul(x_stride, _const(m))) for m in range(num_inputs)]

        def accumulate(index, sums, mask=None):
            w_at = builder.mul(index, _const(_BYTES[kind]))
            x_at = builder.mul(index, _const(4))
            activations = [_load(builder, builder.add(a, x_at), FLOAT32, mask) for a in inputs]
            new = list(sums)
            for n, row in enumerate(rows):
                here = builder.add(row, w_at)
                weight = _load(builder, here, kind, mask)
                if bytes_ahead:
                    _fetch(builder, builder.add(here, _const(bytes_ahead)))
                for m, activation in enumerate(activations):
                    place = m * num_rows + n
                    new[place] = _fma(builder, weight, activation, sums[place])
            return new

        zero = ir.Constant(_VECTOR, None)
        full = builder.and_(size, _const(-LANES))
        sums = _loop(builder, full, LANES, [zero] * (num_rows * num_inputs), accumulate)
        left = builder.sub(size, full)
        start = builder.block
        tail = builder.append_basic_block("tail")
        done = builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed(">", left, _const(0)), tail, done)
        builder.position_at_end(tail)
        with_tail = accumulate(full, sums, _tail_mask(builder, left))
        builder.branch(done)
        builder.position_at_end(done)
        totals = []
        for without, added in zip(sums, with_tail, strict=True):
            phi = builder.phi(_VECTOR)
            phi.add_incoming(without, start)
            phi.add_incoming(added, tail)
            totals.append(phi)
        # All rows of one input lie side by side, here and in `out`.
        piece = ir.VectorType(_F32, num_rows)
        if kind == INT8:
            scale = builder.load(builder.inttoptr(scales, piece.as_pointer()), align=4)
        for first in range(0, len(totals), LANES):
            summed = _pairwise(builder, totals[first : first + LANES])
            for begin in range(0, min(LANES, len(totals) - first), num_rows):
                lanes = ir.Constant(
                    ir.VectorType(_I32, num_rows), list(range(begin, begin + num_rows))
                )
                nothing = ir.Constant(_VECTOR, ir.Undefined)
                value = builder.shuffle_vector(summed, nothing, lanes)
                if kind == INT8:
                    value = builder.fmul(value, scale)
                m = (first + begin) // num_rows
                at = builder.add(out, builder.mul(out_stride, _const(m)))
                builder.store(value, builder.inttoptr(at, piece.as_pointer()), align=4)

    name = f"openm1_dots_{num_rows}x{num_inputs}_{kind}_{bytes_ahead}"
    codegen = _outlined(name, 8, build)

    @intrinsic
    def dots(typingctx, w, w_stride, x, x_stride, size, scales, out, out_stride):
        return types.void(*[types.int64] * 8), codegen

    return dots


def make_weighted_sum(
    num_inputs: int, num_vectors: int, kind: int, *, adds: bool = True, whole: bool = False
):
    """weighted_sum(p, p_stride, p_step, v, v_stride, count, out, out_stride, width).

    out[m, d] += sum_n p[m, n] v[n, d] for d < width <= num_vectors * LANES, or just that sum unless
    it `adds`; p and out are fp32. `p_stride` is from m to m + 1, `p_step` from n to n + 1: p may be
    a transposed matrix. A width below num_vectors * LANES is for a single vector only, and not if
    it must be `whole`.
    """

    def build(builder, p, p_stride, p_step, v, v_stride, count, out, out_stride, width):
        mask = _tail_mask(builder, width) if num_vectors == 1 and not whole else None
        places = []
        for m in range(num_inputs):
            row = builder.add(out, builder.mul(out_stride, _const(m)))
            places += [builder.add(row, _const(4 * LANES * j)) for j in range(num_vectors)]
        zero = ir.Constant(_VECTOR, None)
        before = [_load(builder, at, FLOAT32, mask) if adds else zero for at in places]

        def accumulate(index, sums):
            row = builder.add(v, builder.mul(v_stride, index))
            offsets = [_const(LANES * _BYTES[kind] * j) for j in range(num_vectors)]
            values = [_load(builder, builder.add(row, at), kind, mask) for at in offsets]
            new = []
            for m in range(num_inputs):
                at = builder.add(p, builder.mul(p_stride, _const(m)))
                at = builder.add(at, builder.mul(index, p_step))
                weight = builder.load(builder.inttoptr(at, _F32.as_pointer()), align=4)
                many = _splat(builder, weight)
                for j, value in enumerate(values):
                    new.append(_fma(builder, many, value, sums[m * num_vectors + j]))
            return new

        sums = _loop(builder, count, 1, before, accumulate)
        for place, value in zip(places, sums, strict=True):
            pointer = builder.inttoptr(place, _VECTOR.as_pointer())
            if mask is None:
                builder.store(value, pointer, align=4)
            else:
                name = f"llvm.masked.store.v{LANES}f32.p0"
                args = [value, pointer, ir.Constant(_I32, 4), mask]
                _call(builder, name, ir.VoidType(), args)

    name = f"openm1_sum_{num_inputs}x{num_vectors}_{kind}_{int(adds)}{int(whole)}"
    codegen = _outlined(name, 9, build)

    @intrinsic
    def weighted_sum(typingctx, p, p_stride, p_step, v, v_stride, count, out, out_stride, width):
        return types.void(*[types.int64] * 9), codegen

    return weighted_sum


dots_8x1_f32, dots_8x1_bf16, dots_8x1_i8 = (_make_dots(8, 1, kind) for kind in _ELEMENT)
dots_1x1_bf16_ahead, dots_2x4_bf16_ahead, dots_2x8_bf16_ahead = (
    _make_dots(*shape, BFLOAT16, bytes_ahead=2**14) for shape in ((1, 1), (2, 4), (2, 8))
)
dots_4x4_f32, dots_4x4_bf16, dots_4x4_i8 = (_make_dots(4, 4, kind) for kind in _ELEMENT)
dots_1x1_f32, dots_1x1_bf16, dots_1x1_i8 = (_make_dots(1, 1, kind) for kind in _ELEMENT)
weighted_sum_4x4_f32, weighted_sum_4x4_bf16 = (
    make_weighted_sum(4, 4, kind) for kind in (FLOAT32, BFLOAT16)
)
weighted_sum_1x1_f32, weighted_sum_1x1_bf16 = (
    make_weighted_sum(1, 1, kind) for kind in (FLOAT32, BFLOAT16)
)


@intrinsic
def exp_f32(typingctx, x):
    """exp in arithmetic that vectorises; relative error below 2e-7, 0 below -87, clamped at 88; of
    NaN it is NaN."""

    def codegen(context, builder, signature, args):
        def const(value):
            return ir.Constant(_F32, value)

        def fma(a, b, c):
            return _call(builder, "llvm.fma.f32", _F32, [a, b, c])

        low = _call(builder, "llvm.maxnum.f32", _F32, [args[0], const(-87.0)])
        value = _call(builder, "llvm.minnum.f32", _F32, [low, const(88.0)])
        turns = fma(value, const(1.4426950408889634), const(0.5))
        whole = _call(builder, "llvm.floor.f32", _F32, [turns])
        # ln 2 in two parts, the first with few enough bits that its product with `whole` is exact.
        rest = fma(whole, const(-0.693359375), value)
        rest = fma(whole, const(2.12194440e-4), rest)
        series = const(1.0 / 5040)
        for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            series = fma(series, rest, const(factor))
        exponent = builder.add(builder.fptosi(whole, _I32), ir.Constant(_I32, 127))
        power = builder.bitcast(builder.shl(exponent, ir.Constant(_I32, 23)), _F32)
        product = builder.fmul(series, power)
        tiny = builder.fcmp_ordered("<", args[0], const(-87.0))
        result = builder.select(tiny, const(0.0), product)
        return builder.select(builder.fcmp_unordered("uno", *args, *args), args[0], result)

    return types.float32(types.float32), codegen


@intrinsic
def largest_f32(typingctx, address, count):
    """The largest of `count` floats, a multiple of LANES; NaN if there is one among them."""

    def codegen(context, builder, signature, args):
        start, total = args
        lowest = ir.Constant(_VECTOR, [float("-inf")] * LANES)
        clean = ir.Constant(ir.VectorType(_I1, LANES), [0] * LANES)

        def body(index, carried):
            best, bad = carried
            value = _load(builder, builder.add(start, builder.mul(index, _const(4))), FLOAT32)
            more = builder.fcmp_ordered(">", value, best)
            is_nan = builder.fcmp_unordered("uno", value, value)
            return [builder.select(more, value, best), builder.or_(bad, is_nan)]

        best, bad = _loop(builder, total, LANES, [lowest, clean], body)
        top = _call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", _F32, [best])
        some = _call(builder, f"llvm.vector.reduce.or.v{LANES}i1", _I1, [bad])
        return builder.select(some, ir.Constant(_F32, float("nan")), top)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def pointer_f32(typingctx, address):
    """An address as a pointer that `carray` takes."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], _F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic
def pointer_u16(typingctx, address):
    """An address as a pointer to bf16 bits."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], _I16.as_pointer())

    return types.CPointer(types.uint16)(types.int64), codegen


@intrinsic
def pointer_u32(typingctx, address):
    """An address as a pointer to uint32."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], _I32.as_pointer())

    return types.CPointer(types.uint32)(types.int64), codegen


@intrinsic
def pointer_i32(typingctx, address):
    """An address as a pointer to int32."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], _I32.as_pointer())

    return types.CPointer(types.int32)(types.int64), codegen


@intrinsic
def pointer_i64(typingctx, address):
    """An address as a pointer to int64."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], _I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def bits_double(typingctx, x):
    """The float64 with these bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic
def pointer_f64(typingctx, address):
    """An address as a pointer to float64."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.DoubleType().as_pointer())

    return types.CPointer(types.float64)(types.int64), codegen


@intrinsic
def float_bits(typingctx, x):
    """The bits of a float32 as uint32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _I32)

    return types.uint32(types.float32), codegen


@intrinsic
def bits_float(typingctx, x):
    """The float32 with these bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), codegen


@intrinsic
def atomic_add(typingctx, address, amount):
    """Adds to the int64 at `address`, all threads seeing one order; returns what it was."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_exchange(typingctx, address, value):
    """Writes the int64 at `address`, all threads seeing one order; returns what it was."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("xchg", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx, address):
    """The int64 at `address`, with everything its writer wrote before it."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def fetch(typingctx, address):
    """Asks for the cache line at `address`, which need not be memory of ours."""

    def codegen(context, builder, signature, args):
        _fetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tells the core that this is a loop of waiting."""

    def codegen(context, builder, signature, args):
        if llvm.get_default_triple().startswith("x86_64"):
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_job(typingctx, function, thread, num_threads, counter, arguments):
    """Calls the machine code at address `function`; see `compile.job`."""

    def codegen(context, builder, signature, args):
        pointer = ir.FunctionType(ir.VoidType(), [_I64] * 4).as_pointer()
        builder.call(builder.inttoptr(args[0], pointer), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


# The tile unit (AMX) multiplies 16 rows of 32 bf16 weights with 32 x 16 activations at a time.
TILE_ROWS, TILE_DEPTH = 16, 32
_POINTER = _I8.as_pointer()


def _tile(builder: Value, name: str, *args: Value | int) -> None:
    """A tile instruction; plain integers are tile numbers. Nothing where there is no tile unit:
    the code around it is compiled there too, and never runs."""
    if not HAS_TILES:
        return
    values = [ir.Constant(_I8, a) if isinstance(a, int) else a for a in args]
    _call(builder, f"llvm.x86.{name}", ir.VoidType(), values)


def _make_tile_dots(num_groups: int):
    """tile_dots(w, w_stride, x, x_stride, size, out, out_stride).

    out[n, m] = sum_i w[n, i] x[i, m] for 2 * TILE_ROWS rows of bf16 weights as they lie in memory
    and num_groups * 16 inputs, packed by `pack_tiles` in groups `x_stride` apart. `size` is a
    multiple of TILE_DEPTH.
    """

    def build(builder, w, w_stride, x, x_stride, size, out, out_stride):
        for sums in range(2 * num_groups):
            _tile(builder, "tilezero", sums)
        lower = builder.add(w, builder.mul(w_stride, _const(TILE_ROWS)))
        groups = [builder.add(x, builder.mul(x_stride, _const(g))) for g in range(num_groups)]

        def accumulate(index, carried):
            at = builder.mul(index, _const(2))
            for tile, rows in ((4, w), (5, lower)):
                place = builder.inttoptr(builder.add(rows, at), _POINTER)
                _tile(builder, "tileloadd64", tile, place, w_stride)
            for g, group in enumerate(groups):
                place = builder.add(group, builder.mul(index, _const(TILE_DEPTH)))
                tile = 6 + g
                _tile(builder, "tileloadd64", tile, builder.inttoptr(place, _POINTER), _const(64))
                _tile(builder, "tdpbf16ps", 2 * g, 4, tile)
                _tile(builder, "tdpbf16ps", 2 * g + 1, 5, tile)
            return []

        _loop(builder, size, TILE_DEPTH, [], accumulate)
        for g in range(num_groups):
            for half in range(2):
                row = builder.add(out, builder.mul(out_stride, _const(TILE_ROWS * half)))
                place = builder.inttoptr(builder.add(row, _const(64 * g)), _POINTER)
                _tile(builder, "tilestored64", 2 * g + half, place, out_stride)

    codegen = _outlined(f"openm1_tile_dots_{num_groups}", 7, build)

    @intrinsic
    def tile_dots(typingctx, w, w_stride, x, x_stride, size, out, out_stride):
        return types.void(*[types.int64] * 7), codegen

    return tile_dots


tile_dots_1, tile_dots_2 = _make_tile_dots(1), _make_tile_dots(2)


@intrinsic
def tile_configure(typingctx, address):
    """Sets up this thread's tiles from the 64 bytes at `address`."""

    def codegen(context, builder, signature, args):
        _tile(builder, "ldtilecfg", builder.inttoptr(args[0], _POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def tile_release(typingctx):
    def codegen(context, builder, signature, args):
        _tile(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


# Vectors of as many lanes as a tile has rows, whatever this CPU's registers hold.
_FLOATS, _WORDS = ir.VectorType(_F32, TILE_ROWS), ir.VectorType(_I32, TILE_ROWS)


def _words(values: Sequence[int]) -> Value:
    return ir.Constant(ir.VectorType(_I32, len(values)), list(values))


def _row_at(builder: Value, address: Value, offset: int) -> Value:
    return builder.inttoptr(builder.add(address, _const(offset)), _FLOATS.as_pointer())


def _as_bf16(builder: Value, x: Value) -> Value:
    """Floats as 32-bit words whose upper halves are the nearest bf16, ties to even; NaN stays."""

    def many(value: int) -> Value:
        return _words([value] * TILE_ROWS)

    bits = builder.bitcast(x, _WORDS)
    odd = builder.and_(builder.lshr(bits, many(16)), many(1))
    rounded = builder.add(builder.add(bits, many(0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", x, x)
    return builder.select(is_nan, many(0x7FC00000), rounded)


def _pairs(builder: Value, low: Value, high: Value) -> Value:
    """Words of two bf16 each, from words whose upper halves they are."""
    low = builder.lshr(low, _words([16] * TILE_ROWS))
    return builder.or_(low, builder.and_(high, _words([0xFFFF0000] * TILE_ROWS)))


def _bf16_words(builder: Value, address: Value) -> Value:
    """TILE_ROWS bf16 as the upper halves of words."""
    short = ir.VectorType(_I16, TILE_ROWS)
    raw = builder.load(builder.inttoptr(address, short.as_pointer()), align=2)
    return builder.shl(builder.zext(raw, _WORDS), _words([16] * TILE_ROWS))


def _store(builder: Value, value: Value, address: Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=2)


@intrinsic
def pack_block(typingctx, source, target):
    """32 floats as 16 words of two bf16 each, a word every 64 bytes."""

    def codegen(context, builder, signature, args):
        halves = [builder.load(_row_at(builder, args[0], at), align=4) for at in (0, 64)]

        def every_other(start: int) -> Value:
            lanes = _words(range(start, 2 * TILE_ROWS, 2))
            return _as_bf16(builder, builder.shuffle_vector(*halves, lanes))

        words = _pairs(builder, every_other(0), every_other(1))
        for lane in range(TILE_ROWS):
            word = builder.extract_element(words, ir.Constant(_I32, lane))
            at = builder.add(args[1], _const(64 * lane))
            builder.store(word, builder.inttoptr(at, _I32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def pair_bf16(typingctx, low, high, target):
    """Two rows of 16 bf16 as a row of words: how tiles take two terms of 16 columns."""

    def codegen(context, builder, signature, args):
        words = [_bf16_words(builder, address) for address in args[:2]]
        _store(builder, _pairs(builder, *words), args[2])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def pair_floats(typingctx, low, high, target):
    """Two rows of 16 floats, rounded to bf16, as a row of words."""

    def codegen(context, builder, signature, args):
        floats = [builder.load(_row_at(builder, address, 0), align=4) for address in args[:2]]
        words = [_as_bf16(builder, x) for x in floats]
        _store(builder, _pairs(builder, *words), args[2])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def pair_scaled(typingctx, low, high, low_scale, high_scale, target, rest):
    """`pair_bf16` of two rows times a float each, rounded; in `rest` what rounding left of them."""

    def codegen(context, builder, signature, args):
        rounded, left = [], []
        for address, scale in zip(args[:2], args[2:4], strict=True):
            one = builder.insert_element(
                ir.Constant(_FLOATS, ir.Undefined), scale, ir.Constant(_I32, 0)
            )
            many = builder.shuffle_vector(one, one, _words([0] * TILE_ROWS))
            value = builder.bitcast(_bf16_words(builder, address), _FLOATS)
            value = builder.fmul(value, many)
            near = builder.and_(_as_bf16(builder, value), _words([0xFFFF0000] * TILE_ROWS))
            rounded.append(near)
            left.append(_as_bf16(builder, builder.fsub(value, builder.bitcast(near, _FLOATS))))
        _store(builder, _pairs(builder, *rounded), args[4])
        _store(builder, _pairs(builder, *left), args[5])
        return context.get_dummy_value()

    numbers = [types.int64] * 2 + [types.float32] * 2 + [types.int64] * 2
    return types.void(*numbers), codegen


@intrinsic
def separate_bf16(typingctx, source, low, high):
    """A row of 16 words as two rows of bf16."""

    def codegen(context, builder, signature, args):
        short = ir.VectorType(_I16, TILE_ROWS)
        words = builder.load(builder.inttoptr(args[0], _WORDS.as_pointer()), align=4)
        _store(builder, builder.trunc(words, short), args[1])
        upper = builder.lshr(words, _words([16] * TILE_ROWS))
        _store(builder, builder.trunc(upper, short), args[2])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def transpose_tile(typingctx, source, source_stride, target, target_stride):
    """16 rows of 16 floats or other words of 32 bits; addresses and byte strides."""

    def codegen(context, builder, signature, args):
        source, source_stride, target, target_stride = args

        def row_at(base, stride, i):
            place = builder.add(base, builder.mul(stride, _const(i)))
            return builder.inttoptr(place, _FLOATS.as_pointer())

        rows = [builder.load(row_at(source, source_stride, i), align=4) for i in range(TILE_ROWS)]
        # Swaps blocks of one, two, four and eight across the diagonal.
        for size in (1, 2, 4, 8):
            upper = [n if not n & size else TILE_ROWS + n - size for n in range(TILE_ROWS)]
            lower = [n + size if not n & size else TILE_ROWS + n for n in range(TILE_ROWS)]
            for i in (i for i in range(TILE_ROWS) if not i & size):
                pair = rows[i], rows[i + size]
                rows[i] = builder.shuffle_vector(*pair, _words(upper))
                rows[i + size] = builder.shuffle_vector(*pair, _words(lower))
        for i, row in enumerate(rows):
            builder.store(row, row_at(target, target_stride, i), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


HAS_YIELD = sys.platform != "win32"
give_up_core = types.ExternalFunction("sched_yield", types.int32())
