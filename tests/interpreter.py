"""Triton's interpreter made faithful for bf16 and seven times as fast, so that the kernels can be tested without a GPU.

With TRITON_INTERPRET=1 Triton runs kernels with numpy on CPU tensors. Up to version 3.9 it does not know bf16, which
numpy does not have: it stores the 16 bits in uint16, computes on those integers as if they were the numbers, and
truncates where a GPU rounds to nearest even. `install` makes products, elementwise operations and casts widen to fp32
and round back. Reductions (tl.sum, tl.max) of bf16 stay wrong; the kernels widen before they reduce, as they must for
precision anyway.

The time goes into Python: a program of a kernel is some thousand operations on small blocks, and Triton repeats for each
what the process needs once. `make_fast` removes the repetition and changes no result.

The interpreter runs one program after the other: it shows wrong arithmetic, wrong indices and unwritten outputs, but
neither races nor reads out of bounds. So the tests poison outputs with NaN and cut inputs out of NaN-padded buffers.
"""

import numpy as np
import triton.experimental.gluon  # noqa: F401  Triton imports it at the first launch and then asks for the variable again
import triton.language as tl
import triton.language.core as core  # `_patch_lang` looks for both in the globals of a function
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widen(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bf16 -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(x: np.ndarray) -> np.ndarray:
    """fp32 -> uint16 bits of the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def install() -> None:
    """Patches the interpreter of this process; once."""
    if not hasattr(InterpreterBuilder, "installed"):
        make_faithful(InterpreterBuilder)
        make_fast()
        InterpreterBuilder.installed = True


def make_faithful(builder: type) -> None:
    dot, cast, binary, unary = builder.create_dot, builder.cast_impl, builder.binary_op, builder.unary_op

    def is_bf16(x):
        return x.dtype.scalar.name == "bf16"

    def wide(x):
        return TensorHandle(_widen(x.data), tl.float32) if is_bf16(x) else x

    def new_dot(self, a, b, accumulator, precision, max_imprecise):
        return dot(self, wide(a), wide(b), accumulator, precision, max_imprecise)

    def new_cast(self, x, to):
        if to.scalar == tl.bfloat16 and not is_bf16(x) and x.dtype.scalar.is_floating():
            return TensorHandle(_round(x.data.astype(np.float32)), tl.bfloat16)
        if is_bf16(x) and to.scalar != tl.bfloat16:
            return TensorHandle(_widen(x.data).astype(interpreter._get_np_dtype(to)), to.scalar)
        return cast(self, x, to)

    def new_binary(self, a, b, op):
        if not (is_bf16(a) and is_bf16(b)):
            return binary(self, a, b, op)
        result = op(_widen(a.data), _widen(b.data))
        return TensorHandle(result, tl.int1) if result.dtype == bool else TensorHandle(_round(result), tl.bfloat16)

    def new_unary(self, x, op):
        return TensorHandle(_round(op(_widen(x.data))), tl.bfloat16) if is_bf16(x) else unary(self, x, op)

    builder.create_dot, builder.cast_impl = new_dot, new_cast
    builder.binary_op, builder.unary_op = new_binary, new_unary


def make_fast() -> None:
    """Triton's own functions, with what they compute again for every operation computed once."""
    numpy_dtype, block_init = interpreter._get_np_dtype, tl.block_type.__init__
    semantic, unwrap = interpreter.TritonSemantic, core._unwrap_if_constexpr
    broadcast, computation_type = semantic.broadcast_impl_value, semantic.computation_type_impl
    type_check, scalar_constant, block_new, equal = (
        semantic.binary_op_type_checking_impl,
        semantic.scalar_constant,
        tl.block_type.__new__,
        tl.dtype.__eq__,
    )
    dtypes, blocks, joint_sizes, computation_types, constants = {}, {}, {}, {}, {}
    no_cast = {"int1", "int32", "int64", "fp32", "fp64"}  # two of one of these compute in that type
    not_wrapped = {tl.tensor, tl.dtype, tl.pointer_type, tl.block_type, int, float, bool, str, type(None)}
    tl.dtype.of_tensor = tl.tuple([]), tl.constexpr(1)

    def new_numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(dtype)
        return dtypes[name]

    def new_block_new(cls, element_ty, shape):
        key = element_ty.name, tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if key not in blocks:
            made = block_new(cls)
            block_init(made, element_ty, list(key[1]))  # with its checks
            made.of_tensor = tl.tuple([tl.constexpr(size) for size in made.shape]), tl.constexpr(made.numel)
            blocks[key] = made
        return blocks[key]

    def new_tensor_init(self, handle, type):
        self.shape, self.numel = type.of_tensor
        self.handle, self.type, self.dtype = handle, type, type.scalar

    def new_broadcast(self, a, b):
        a_is_block, b_is_block = a.type.is_block(), b.type.is_block()
        if a_is_block and b_is_block:
            sizes = a.handle.data.shape, b.handle.data.shape
            if sizes not in joint_sizes:
                wide, _ = broadcast(self, a, b)  # with its checks
                joint_sizes[sizes] = wide.handle.data.shape
            return spread(a, joint_sizes[sizes]), spread(b, joint_sizes[sizes])
        if a_is_block:
            return a, spread(b, a.handle.data.shape)
        return (spread(a, b.handle.data.shape) if b_is_block else a), b

    def spread(x, sizes):
        if x.type.is_block() and x.handle.data.shape == sizes:
            return x
        data = x.handle.data
        if data.size == 1:  # as broadcast_to, with less ado
            data = np.ndarray(sizes, data.dtype, data, 0, (0,) * len(sizes))
        else:
            data = np.broadcast_to(data, sizes)
        return tl.tensor(TensorHandle(data, x.dtype), tl.block_type(x.dtype, sizes))

    def new_computation_type(self, *types):
        key = tuple([x.name if isinstance(x, tl.dtype) else x for x in types])
        if key not in computation_types:
            computation_types[key] = computation_type(self, *types)
        return computation_types[key]

    def new_type_check(self, a, b, *options, **named_options):
        if type(a) is type(b) is tl.tensor and a.dtype is b.dtype and a.dtype.name in no_cast:
            return new_broadcast(self, a, b)
        return type_check(self, a, b, *options, **named_options)

    def new_scalar_constant(self, value, dtype):
        key = value, type(value), dtype
        if key not in constants:
            constants[key] = scalar_constant(self, value, dtype)
        return constants[key]

    def new_equal(self, other):
        return self is other or equal(self, other)

    def new_unwrap(x):
        return x if type(x) in not_wrapped else unwrap(x)

    def patch_builtin(obj, name, member, builder, scope):
        def call_builtin(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **kwargs)

        member = getattr(member, "__wrapped__", member)  # without the check that a semantic was given
        scope.set_attr(obj, name, call_builtin)

    def call(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    interpreter._get_np_dtype = new_numpy_dtype
    TensorHandle.__post_init__ = lambda self: None  # a check of the interpreter itself
    tl.block_type.__new__, tl.block_type.__init__ = new_block_new, lambda self, element_ty, shape: None
    tl.tensor.__init__, tl.dtype.__eq__ = new_tensor_init, new_equal
    semantic.broadcast_impl_value, semantic.computation_type_impl = new_broadcast, new_computation_type
    semantic.binary_op_type_checking_impl, semantic.scalar_constant = new_type_check, new_scalar_constant
    core._unwrap_if_constexpr = tl._unwrap_if_constexpr = new_unwrap
    interpreter._patch_attr = patch_builtin
    # The check of integers for overflow is computed at every operation and then dropped: options.debug is off.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    # Triton patches its language at every call of a function, thousands of times. Here once, for good.
    interpreter._patch_lang(make_fast)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    interpreter.InterpretedFunction.__call__ = call
