"""How the kernels are built: by whom, where, and what happens when they cannot be. Processes of their own find out."""

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from saelib import native

compiled = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="kernels are compiled on Linux, where there is a compiler"
)

CHECK = """
import sys, warnings
from pathlib import Path
import torch
from saelib import native, ops

native.BUILD = Path(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    library, again = native.library(), native.library()
x = torch.randn(20, 600, generator=torch.Generator().manual_seed(0))
values, indices = ops.topk(x, 9)
assert torch.equal(values, x.topk(9).values) and torch.equal(x.gather(1, indices), values)
columns, found = torch.arange(0, 600, 3), torch.empty(20, 200)
ops.topk_and_largest(x, 9, columns, 600, found)
assert torch.equal(found, x[:, columns].relu())
print("compiled" if library is not None else "plain", *(str(warning.message) for warning in caught), sep="\\n")
"""


def start(build, **environment):
    """A process that loads the kernels, kept in `build`, and checks the operations."""
    variables = {key: value for key, value in os.environ.items() if key not in {"CC", "SAELIB_NATIVE"}}
    variables |= {"OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", textwrap.dedent(CHECK), str(build)]
    root, pipe = native.SOURCE.parent.parent, subprocess.PIPE
    return subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True, cwd=root)


def end(process):
    """What it found: "compiled" or "plain", and the warnings."""
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return out.splitlines()


@compiled
def test_a_compiler_that_fails_is_told_of_once_and_pytorch_does_the_work(tmp_path):
    kind, warning = end(start(tmp_path, CC="false"))
    assert kind == "plain" and "kernels.c is not used" in warning and "false" in warning
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\necho kernels.c:1: what is this >&2\necho more >&2\nexit 1\n")
    fails.chmod(0o755)
    kind, warning = end(start(tmp_path, CC=str(fails)))
    assert kind == "plain" and warning.endswith(": kernels.c:1: what is this")
    assert not list(tmp_path.rglob("*.so"))


def test_without_a_compiler_or_if_asked_pytorch_does_the_work_in_silence(tmp_path):
    processes = [start(tmp_path, CC="no-such-compiler"), start(tmp_path, SAELIB_NATIVE="0")]
    assert [end(process) for process in processes] == [["plain"], ["plain"]]
    assert not list(tmp_path.iterdir())


@compiled
def test_two_processes_that_build_at_once_both_get_kernels(tmp_path):
    processes = [start(tmp_path, CC=shlex.join(["cc", "-DANY=a b"])) for _ in range(2)]  # a command with arguments
    assert [end(process) for process in processes] == [["compiled"]] * 2
    (library,) = (tmp_path / "cache").iterdir()  # and nothing else is left behind
    assert library.suffix == ".so"


@compiled
def test_kernels_that_cannot_be_kept_are_built_all_the_same(tmp_path):
    (tmp_path / "file").touch()
    assert end(start(tmp_path / "file")) == ["compiled"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def maps(*paths):
    line = "7f4b76d39000-7f4b76d3a000 r-xp 00000000 08:01 {} {}"
    return "\n".join(line.format(i, path) for i, path in enumerate(["", "[heap]", "/usr/lib/libc.so.6", *paths])) + "\n"


def test_openmp_is_the_one_that_pytorch_brought(monkeypatch):
    site = "/opt/my env/lib/python3.11/site-packages"
    other, second = f"{site}/sentencepiece.libs/libgomp-1a2b.so.1", f"{site}/torchaudio.libs/libgomp-3c4d.so.1"
    monkeypatch.setattr(native.torch, "__file__", f"{site}/torch/__init__.py")
    for own in (f"{site}/torch/lib/libgomp.so.1", f"{site}/torch.libs/libgomp-5e6f.so.1"):
        monkeypatch.setattr(Path, "read_text", lambda _, own=own: maps(other, second, own))
        assert native._openmp() == own
    monkeypatch.setattr(Path, "read_text", lambda _: maps("/opt/conda/lib/libgomp.so.1"))
    assert native._openmp() == "/opt/conda/lib/libgomp.so.1"
    monkeypatch.setattr(Path, "read_text", lambda _: maps())
    with pytest.raises(OSError, match="PyTorch has loaded no libgomp"):
        native._openmp()


def test_the_key_changes_with_the_processor_and_not_with_its_clock(monkeypatch):
    source = native.SOURCE.read_text()
    lines = "processor : {}\ncpu MHz : {}\nflags : {}\nBogoMIPS : {}\nCPU part : {}\n"

    def key(*values, compiler=("cc",)):
        info = lines.format(*values)
        monkeypatch.setattr(Path, "read_text", lambda path: source if path == native.SOURCE else info)
        return native._key(list(compiler))

    one = key(0, 2300.1, "avx2", 50, "0xd0c")
    assert key(7, 3100.9, "avx2", 48, "0xd0c") == one
    others = [key(0, 2300.1, "avx512f", 50, "0xd0c"), key(0, 2300.1, "avx2", 50, "0xd40")]
    others.append(key(0, 2300.1, "avx2", 50, "0xd0c", compiler=("cc", "-O1")))
    assert len({one, *others}) == 4
