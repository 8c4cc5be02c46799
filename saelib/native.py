"""`kernels.c`, built once with the machine's C compiler.

Where there is none, or the kernels do not apply (a GPU, another dtype, another system), `ops.py` does the same in
PyTorch. `SAELIB_NATIVE=0` asks for that.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelib.profile import BUILD

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ["-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built kernels, or None. They run in the threads of the OpenMP that PyTorch has loaded: two pools of threads
    would get in each other's way."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if sys.platform != "linux" or os.environ.get("SAELIB_NATIVE") == "0" or not compiler:
        return None
    try:
        loaded = Path("/proc/self/maps").read_text().splitlines()
        openmp = next(line.split()[-1] for line in loaded if "libgomp" in line)
        ctypes.CDLL(openmp, ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, StopIteration, subprocess.CalledProcessError):
        return None


def _built(compiler: str) -> Path:
    """The shared object; its name changes with the source and with the processor it was built for."""
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "model"))]
    key = hashlib.sha256(
        "\0".join([SOURCE.read_text(), compiler, *FLAGS, *sorted(set(processor))]).encode()
    ).hexdigest()
    path = BUILD / "cache" / f"kernels-{key[:12]}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part, partial = (path.with_suffix(f".{os.getpid()}.{kind}") for kind in ("o", "partial"))
        for command in (
            ["-c", str(SOURCE), "-o", str(part), *FLAGS],
            ["-shared", str(part), "-o", str(partial), "-lm"],
        ):
            subprocess.run([compiler, *command], check=True, capture_output=True)
        part.unlink()
        partial.replace(path)
    return path


def _usable(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernels, if they take these tensors."""
    fits = all(x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous() for x in tensors)
    return library() if fits else None


def _arguments(*values: Tensor | int | float) -> list:
    kinds = {int: ctypes.c_long, float: ctypes.c_float, bool: ctypes.c_int}
    return [ctypes.c_void_p(v.data_ptr()) if isinstance(v, Tensor) else kinds[type(v)](v) for v in values]


def topk(x: Float[Tensor, "rows n"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]] | None:
    """`torch.topk`, or None where the kernel does not apply: wide selections, and values that are not numbers."""
    kernels = _usable(x) if k * 4 <= x.shape[1] else None
    if kernels is None:
        return None
    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64)
    return (values, indices) if kernels.topk(*_arguments(x, *x.shape, k, values, indices)) == 0 else None


def largest(x: Float[Tensor, "rows n"], columns: Int[Tensor, "m"], k: int) -> Float[Tensor, "rows m"] | None:
    """`ops.largest`, or None where the kernel does not apply."""
    kernels = _usable(x)
    if kernels is None:
        return None
    z = x.new_empty(len(x), len(columns))
    kernels.largest(*_arguments(x, *x.shape, columns, len(columns), k, z))
    return z


def gradients(starts, order, z, g, x, W_dec, to_dec, to_enc, to_latent) -> bool:
    """`ops.gradients` for sorted pairs; False where the kernel does not apply."""
    kernels = _usable(z, g, x, W_dec, to_dec, to_enc)
    if kernels is not None:
        sets, tokens, k = z.shape
        sizes = (*W_dec.shape, k, tokens, sets)
        kernels.gradients(*_arguments(*sizes, starts, order, z, g, x, W_dec, to_dec, to_enc, to_latent))
    return kernels is not None


def update(tensors: list[Float[Tensor, "n d_model"]], numbers: list[float], project: bool, unit: bool) -> bool:
    """`ops.update` of one parameter; False where the kernel does not apply."""
    kernels = _usable(*tensors)
    if kernels is not None:
        kernels.update(*_arguments(*tensors[0].shape, *tensors, *numbers, project, unit))
    return kernels is not None


def across(gradient: Float[Tensor, "n d_model"], weight: Float[Tensor, "n d_model"]) -> Float[Tensor, "n"] | None:
    """`ops.across`, or None where the kernel does not apply."""
    kernels = _usable(gradient, weight)
    if kernels is None:
        return None
    squares = gradient.new_empty(len(gradient))
    kernels.across(*_arguments(*gradient.shape, gradient, weight, squares))
    return squares
