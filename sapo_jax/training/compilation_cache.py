"""Where compiled programs are kept, so that the next process need not compile them again.

JAX's persistent compilation cache does the work: its keys hold the program, the version of XLA, its
flags and the devices. This module decides on the folder, `compilation_cache` of the configuration:

    auto    JAX_COMPILATION_CACHE_DIR, or whatever the process has already told JAX; else a folder
            of the user, $XDG_CACHE_HOME/sapo_jax/programs (~/.cache where that is not set)
    none    no cache
    PATH    this folder, which may be in a bucket (gs://...)

A program is the same whether it was compiled or read, so results do not depend on the cache. A
cache that cannot be used costs a notice, and the time to compile.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import tempfile
from pathlib import Path

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

AUTO = "auto"
NONE = "none"
MOST_BYTES = 4 << 30  # of programs that the user's folder keeps; beyond, the oldest go
MIN_COMPILE_SECONDS = 0.0  # all are kept: small ones are many, and compile for a second in all


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which folder the programs of this process are kept in."""

    folder: str | None  # None: they are not kept
    notice: str = ""  # what people should know about it


def use_compilation_cache(setting: str) -> str:
    """Keep the programs of this process where the setting says; returns a notice, or ""."""
    current = jax.config.values["jax_compilation_cache_dir"]
    if setting == AUTO:
        if current or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            return ""
        choice = folder_of_user()
    elif setting == NONE:
        choice = Choice(None)
    else:
        choice = usable_folder(setting)
    if choice.folder != current:
        jax.config.update("jax_compilation_cache_dir", choice.folder)
        # JAX opens its cache once; the next program opens the one that is set now.
        compilation_cache.reset_cache()
    if choice.folder and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return choice.notice


def folder_of_user() -> Choice:
    """The folder of `auto`, one for each kind of processor; it is made and tidied up."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    programs = Path(base) / "sapo_jax" / "programs"
    choice = usable_folder(str(programs / machine_name()))
    if choice.folder is None:
        return choice
    # Whoever can write there can run code in this process.
    if programs.stat().st_uid != os.getuid():
        return Choice(None, _notice(str(programs), "it belongs to another user"))
    programs.chmod(0o700)
    remove_oldest(programs, MOST_BYTES)
    return choice


def usable_folder(path: str) -> Choice:
    """The folder, made where it is missing; without a folder where it cannot be written."""
    if "://" in path:
        return Choice(path)  # a bucket; JAX says what is wrong with it
    folder = Path(path).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Choice(None, _notice(path, error.strerror or str(error)))
    return Choice(str(folder))


def _notice(path: str, reason: str) -> str:
    return (
        f"compiled programs are not kept: {path}: {reason}. Set compilation_cache to a folder that "
        "can be written, or to none"
    )


def machine_name() -> str:
    """A name for what decides whether programs of another process may run in this one on CPU.

    A home directory may be shared by machines whose processors differ, and a program that was
    compiled for the better one crashes on the other. XLA also divides the work of a program among
    the threads that it sees when it compiles.
    """
    parts = [
        platform.machine(),
        _processor_features(),
        str(_num_cores()),
        os.environ.get("PJRT_NPROC", ""),
    ]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return f"jaxlib-{jaxlib.__version__}-{digest}"


def _num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor_features() -> str:
    """What the processor can do, as Linux lists it; elsewhere its name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def remove_oldest(folder: Path, most_bytes: int) -> None:
    """Remove the files that were read or written least recently, until `most_bytes` are left.

    Another process may do the same, or use the files: it compiles what is gone.
    """
    files = []
    total = 0
    for path in folder.glob("*/*"):
        try:
            status = path.stat()
        except OSError:
            continue
        files.append((max(status.st_atime, status.st_mtime), status.st_size, path))
        total += status.st_size
    for _, size, path in sorted(files):
        if total <= most_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size
