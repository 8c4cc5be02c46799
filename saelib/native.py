"""`kernels.c`, built once with the machine's C compiler.

Where there is none, or the kernels do not apply (a GPU, another dtype, another system), `ops.py` does the same in
PyTorch. `SAELIB_NATIVE=0` asks for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelib.profile import BUILD

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ["-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built kernels, or None; with a warning where there is a compiler, but they cannot be built or loaded."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if sys.platform != "linux" or os.environ.get("SAELIB_NATIVE") == "0" or not shutil.which(compiler[0]):
        return None
    try:
        ctypes.CDLL(_openmp(), ctypes.RTLD_GLOBAL)
        return _loaded(compiler)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        warnings.warn(f"kernels.c is not used, PyTorch does its work, but slower: {reason}", stacklevel=2)
        return None


def _openmp() -> str:
    """The OpenMP that PyTorch has loaded. The kernels run in its threads: two pools would get in each other's way."""
    mapped = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    paths = [fields[5] for fields in mapped if len(fields) == 6 and "libgomp" in Path(fields[5]).name]
    if not paths:
        raise OSError("PyTorch has loaded no libgomp")
    folder = Path(torch.__file__).resolve().parent  # other packages bring an OpenMP of their own
    return next((path for path in paths if path.startswith((f"{folder}/", f"{folder}.libs/"))), paths[0])


def _key(compiler: list[str]) -> str:
    """Changes with the source, the command, and the processor: what was built for one may not run on another."""
    varies = ("cpu mhz", "bogomips", "processor", "core id", "apicid", "initial apicid", "physical id")
    lines = set(Path("/proc/cpuinfo").read_text().splitlines())
    processor = sorted(line for line in lines if not line.lower().startswith(varies))
    return hashlib.sha256("\0".join([SOURCE.read_text(), *compiler, *FLAGS, *processor]).encode()).hexdigest()[:12]


def _loaded(compiler: list[str]) -> ctypes.CDLL:
    """The shared object, built if it has not been yet; where it cannot be kept, it is built every time."""
    path = BUILD / "cache" / f"kernels-{_key(compiler)}.so"
    if path.is_file():
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as folder:
        part, built = f"{folder}/kernels.o", f"{folder}/kernels.so"
        for command in (["-c", str(SOURCE), "-o", part, *FLAGS], ["-shared", part, "-o", built, "-lm"]):
            subprocess.run([*compiler, *command], check=True, capture_output=True, text=True)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            shutil.copy(built, partial)
            partial.replace(path)
        return ctypes.CDLL(str(path) if path.is_file() else built)


def _usable(*tensors: Tensor, places: tuple[Tensor, ...] = ()) -> ctypes.CDLL | None:
    """The kernels, if they take these tensors of floats and of indices."""
    kinds = [(x, torch.float32) for x in tensors] + [(x, torch.int64) for x in places]
    fits = all(x.dtype == kind and x.device.type == "cpu" and x.is_contiguous() for x, kind in kinds)
    return library() if fits else None


def _arguments(*values: Tensor | int | float) -> list:
    kinds = {int: ctypes.c_long, float: ctypes.c_float, bool: ctypes.c_int}
    return [ctypes.c_void_p(v.data_ptr()) if isinstance(v, Tensor) else kinds[type(v)](v) for v in values]


def topk(
    x: Float[Tensor, "rows n"], k: int, columns: Int[Tensor, "m"] | None = None, most: int = 0,
    z: Float[Tensor, "rows m"] | None = None,
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]] | None:  # fmt: skip
    """`ops.topk_and_largest`, or None where the kernel does not apply: wide selections, and what is not a number."""
    columns = torch.empty(0, dtype=torch.int64) if columns is None else columns
    z = x.new_empty(len(x), 0) if z is None else z
    kernels = _usable(x, z, places=(columns,)) if 1 <= k <= x.shape[1] // 4 else None
    if kernels is None:
        return None
    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64)
    bad = kernels.topk(*_arguments(x, *x.shape, k, values, indices, columns, len(columns), most, z))
    return None if bad else (values, indices)


def gradients(starts, order, z, g, x, W_dec, to_dec, to_enc, to_latent) -> bool:
    """`ops.gradients` for sorted pairs; False where the kernel does not apply."""
    kernels = _usable(z, g, x, W_dec, to_dec, to_enc, to_latent, places=(starts, order))
    if kernels is not None:
        sets, tokens, k = z.shape
        sizes = (*W_dec.shape, k, tokens, sets)
        kernels.gradients(*_arguments(*sizes, starts, order, z, g, x, W_dec, to_dec, to_enc, to_latent))
    return kernels is not None


def update(tensors: list[Float[Tensor, "n d_model"]], numbers: list[float], project: bool, unit: bool) -> bool:
    """`ops.update` of one parameter; False where the kernel does not apply."""
    kernels = _usable(*tensors)
    if kernels is not None:
        rate, beta1, beta2, *others, ema = numbers
        numbers = [rate, 1 - beta1, 1 - beta2, *others, 1 - ema]
        kernels.adam(*_arguments(*tensors[0].shape, *tensors, *numbers, project, unit))
    return kernels is not None


def across(gradient: Float[Tensor, "n d_model"], weight: Float[Tensor, "n d_model"]) -> Float[Tensor, "n"] | None:
    """`ops.across`, or None where the kernel does not apply."""
    kernels = _usable(gradient, weight)
    if kernels is None:
        return None
    squares = gradient.new_empty(len(gradient))
    kernels.across(*_arguments(*gradient.shape, gradient, weight, squares))
    return squares


def predictions(
    logits: Float[Tensor, "rows vocab"], p: Float[Tensor, "rows vocab"]
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"], Float[Tensor, "rows"]] | None:
    """`splice.statistics`, or None where the kernel does not apply."""
    kernels = _usable(logits, p)
    if kernels is None:
        return None
    found = tuple(logits.new_empty(len(logits)) for _ in range(3))
    kernels.predictions(*_arguments(logits, p, *logits.shape, *found))
    return found
