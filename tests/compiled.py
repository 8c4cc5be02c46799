"""Compile the Triton kernels for a GPU that need not be there; what does not compile raises. For test_triton.py.

Triton compiles an argument that is 1 as a constant, which the interpreter does not: so every integer takes both forms.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saelib import kernels_triton as kernels

INTEGERS = {"tokens", "k", "n", "d", "rows", "chunks", "size", "columns"}
FLOATS = {"rate", "rest1", "rest2", "eps", "root", "scale", "rest"}
POINTERS = {"indices": "*i64", "latents": "*i64", "places": "*i64", "starts": "*i64", "order": "*i64", "keys": "*i32"}
BLOCK = {"PAIRS": kernels.PAIRS, "BLOCK": kernels.COLUMNS}
SEGMENTS = {"SEGMENT": kernels.SEGMENT, "BLOCK": kernels.COLUMNS}
PRODUCT = {"BIASED": True, "PRECISION": "tf32x3", "KEPT": 3, "CHUNK": kernels.CHUNK, "DEPTH": 32, **kernels.TILE}
KERNELS = {
    kernels._decode: BLOCK, kernels._latent: BLOCK | {"SETS": 2}, kernels._segments: BLOCK | SEGMENTS | {"SETS": 2},
    kernels._join: SEGMENTS, kernels._update: {"PROJECT": True, "UNIT": True, "BLOCK": 1024},
    kernels._across: {"BLOCK": 1024}, kernels._encode: PRODUCT,
}  # fmt: skip


def kind(kernel, name: str) -> str:
    if name == "places" and kernel is kernels._encode:
        return "*u8"
    return "i32" if name in INTEGERS else "fp32" if name in FLOATS else POINTERS.get(name, "*fp32")


for kernel, constants in KERNELS.items():
    names = kernel.arg_names
    for ones in ({}, {name: 1 for name in names if name in INTEGERS}):
        fixed = {(names.index(name),): value for name, value in (constants | ones).items()}
        signature = {name: "constexpr" if (i,) in fixed else kind(kernel, name) for i, name in enumerate(names)}
        given = [i for i, name in enumerate(names) if (i,) not in fixed and name not in FLOATS]
        source = ASTSource(kernel, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in given})
        how = {"num_warps": 8, "num_stages": 3} if kernel is kernels._encode else {"num_warps": 4}
        memory = triton.compile(source, GPUTarget("cuda", 86, 32), how).metadata.shared
        assert memory <= 99 * 1024, (kernel.__name__, memory)
        print(kernel.__name__, sorted(ones), memory)
