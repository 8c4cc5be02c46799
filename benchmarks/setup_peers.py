"""One environment per peer of `peers.txt`, below `_build/peers`: `python benchmarks/setup_peers.py [FOLDER]`.

Every peer gets the PyTorch version that our own lock pins, given together with the peer so that none of its
requirements can replace it. An environment that already holds these versions is left alone.
"""

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = ROOT / "_build" / "peers"


def pins(path: Path) -> list[str]:
    """The requirements in a file, comments left out."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def install(folder: Path, torch: str, peer: str) -> None:
    """An environment with these two requirements; its file `installed` says that both are in.

    Raises:
        subprocess.CalledProcessError: pip failed; what it said stands above.
    """
    mark = folder / "installed"
    wanted = f"{torch}\n{peer}\n"
    if mark.is_file() and mark.read_text(encoding="utf-8") == wanted:
        print(f"{peer}: already in {folder}")
        return
    print(f"{peer}: installing into {folder}; this takes some minutes", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pip = [folder / "bin" / "python", "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", torch, peer], check=True)
    # nobody's training step needs it, and the index's build does not load beside a CPU build of PyTorch
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    mark.write_text(wanted, encoding="utf-8")


def main(peers: Path = PEERS) -> None:
    torch = next(pin for pin in pins(ROOT / "requirements.lock") if pin.startswith("torch=="))
    for peer in pins(HERE / "peers.txt"):
        install(peers / peer.partition("==")[0], torch, peer)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
