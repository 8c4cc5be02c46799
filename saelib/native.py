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
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelib.profile import BUILD

SOURCE = Path(__file__).with_name("kernels.c")
TALL = 96
"""About so many rows stand in a thread's memory while `encode` of `kernels.c` chooses among their pre-activations."""
FLAGS = ["-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-strict-aliasing"]


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


def _arguments(*values: Tensor | int | float | None) -> list:
    kinds = {int: ctypes.c_long, float: ctypes.c_float, bool: ctypes.c_int}
    return [
        ctypes.c_void_p(None if v is None else v.data_ptr()) if isinstance(v, Tensor | None) else kinds[type(v)](v)
        for v in values
    ]


class _Choice(ctypes.Structure):
    """`choice` of `kernels.c`."""

    _fields_ = [(name, ctypes.c_long) for name in ("n", "k", "m", "most")] + [
        (name, ctypes.c_void_p) for name in ("columns", "values", "z", "others", "indices", "places")
    ]


def _choice(rows: int, n: int, k: int, columns: Tensor | None, most: int, to: Tensor | tuple | None) -> tuple:
    """Room for the top k of so many rows, what tells the kernels of it, and the kernels, if they take that."""
    z, (others, places) = (to, (None, None)) if isinstance(to, Tensor) else (None, to or (None, None))
    values, indices = (torch.empty(rows, k, dtype=kind, device="cpu") for kind in (torch.float32, torch.int64))
    floats, integers = ([x for x in some if x is not None] for some in ((z, others), (columns, places)))
    pointers = [None if x is None else x.data_ptr() for x in (columns, values, z, others, indices, places)]
    choice = _Choice(n, k, 0 if columns is None else len(columns), most, *pointers)
    return values, indices, choice, _usable(*floats, places=integers)


def topk(
    x: Float[Tensor, "rows n"], k: int, columns: Int[Tensor, "m"] | None = None, most: int = 0,
    to: Tensor | tuple[Tensor, Tensor] | None = None,
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]] | None:  # fmt: skip
    """`ops.topk_and_largest`, or None where the kernel does not apply: wide selections, and what is not a number.

    With k = 0 it is `ops.largest`, of some columns.
    """
    if k > x.shape[1] // 4 or _usable(x) is None:
        return None
    values, indices, choice, kernels = _choice(*x.shape, k, columns, most, to)
    if kernels is None or kernels.topk(*_arguments(x, len(x)), ctypes.byref(choice)):
        return None
    return values, indices


def encode(
    x: Float[Tensor, "rows d_model"], W_enc: Float[Tensor, "n d_model"], bias: Float[Tensor, "n"] | None, k: int,
    room: Callable[..., Tensor] = torch.empty,
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]] | None:  # fmt: skip
    """`ops.topk` of the pre-activations; None where the kernel does not apply, or PyTorch's product is the faster one.

    `room` makes a tensor of some size.
    """
    (rows, d), n, threads = x.shape, len(W_enc), torch.get_num_threads()
    kernels = _usable(*([x, W_enc] if bias is None else [x, W_enc, bias])) if rows and 1 <= k <= n // 4 else None
    high, wide = (ctypes.c_long.in_dll(kernels, name).value if kernels else 0 for name in ("high", "wide"))
    if not wide:
        return None
    tall = -(-rows // (threads * -(-rows // (threads * TALL))))  # as many blocks for each thread
    tall, padded, pairs = -(-tall // high) * high, -(-n // wide) * wide, -(-d // 2)
    memory = room(padded * (pairs + 2) + threads * (tall * (padded + wide + pairs + 2) + wide * pairs))
    values, indices, choice, _ = _choice(rows, n, k, None, 0, None)
    given = x, rows, d, threads, tall, W_enc, bias, memory, memory.nbytes
    return None if kernels.encode(*_arguments(*given), ctypes.byref(choice)) else (values, indices)


def sorted_pairs(indices: Int[Tensor, "batch k"], n: int) -> tuple[Int[Tensor, "n_and_1"], Int[Tensor, "pairs"]] | None:
    """Numbers of the pairs (token, latent) by latent, and where those of each latent start; None as ever."""
    kernels = _usable(places=(indices,))
    if kernels is None:
        return None
    parts = torch.get_num_threads()
    starts, order, counts = (indices.new_empty(size) for size in (n + 1, indices.numel(), parts * n))
    kernels.sorted(*_arguments(indices, indices.numel(), n, parts, counts, starts, order))
    return starts, order


def residuals(
    x: Float[Tensor, "batch d_model"], z: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n d_model"],
) -> Float[Tensor, "batch d_model"] | None:  # fmt: skip
    """`ops.residuals`, or None where the kernel does not apply."""
    kernels = _usable(x, z, W_dec, places=(indices,))
    if kernels is None:
        return None
    out = torch.empty_like(x)
    kernels.residuals(*_arguments(x, *x.shape, z.shape[1], z, indices, W_dec, out))
    return out


def normalized(
    x: Float[Tensor, "*batch d_model"], by_spread: bool, eps: float, tiny: float, noise: float
) -> tuple[Float[Tensor, "*batch d_model"], Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]] | None:
    """What `SAE.normalized` gives, or None where the kernel does not apply."""
    kernels = _usable(x)
    if kernels is None or x.requires_grad:
        return None
    out, (mean, scale) = torch.empty_like(x), (x.new_empty(*x.shape[:-1], 1) for _ in range(2))
    rows, d = mean.numel(), x.shape[-1]
    kernels.normalized(*_arguments(x, rows, d, by_spread, eps, tiny, noise, out, mean, scale))
    return out, mean, scale


def gradients(starts, order, z, g, factors, x, W_dec, to_dec, to_enc, to_latent) -> bool:
    """`ops.gradients` for sorted pairs; False where the kernel does not apply."""
    kernels = _usable(z, g, factors, x, W_dec, to_dec, to_enc, to_latent, places=(starts, order))
    if kernels is not None:
        sets, tokens, k = z.shape
        sizes = (*W_dec.shape, k, tokens, sets)
        kernels.gradients(*_arguments(*sizes, starts, order, z, g, factors, x, W_dec, to_dec, to_enc, to_latent))
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
