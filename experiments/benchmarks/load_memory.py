"""Peak host memory of loading Hugging Face weights, above the model's own share.

    python experiments/benchmarks/load_memory.py                # 2 GB that it makes; SmolLM2
    python experiments/benchmarks/load_memory.py --model DIR    # this one

SmolLM2 is measured where `make smollm2` has fetched it. Hardware: any; 3 GB of memory and disk, a
minute. Expected: the last column is below 2. The script writes results/load_memory.csv.

Anonymous memory (RssAnon) is counted, sampled every 2 ms: pages of the mapped files belong to the
page cache, which the kernel takes back at will. On a CPU the parameters themselves are host
memory; they are subtracted.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sapo_jax.config import Mesh, Model, read_model_keys, to_hugging_face

RESULTS = Path(__file__).parents[1] / "results" / "load_memory.csv"
SMOLLM2 = Path(".cache/smollm2/model")
SYNTHETIC = Model(  # 0.5 B parameters in float32: 2 GB
    vocab_size=64000,
    hidden_size=1280,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=80,
    intermediate_size=3456,
)
SHARD_BYTES = 10**9
SAMPLING_SECONDS = 0.002


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell RssAnon")


class PeakWatcher:
    """Within its `with` block, samples the anonymous memory of this process from a thread."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.is_set():
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
            time.sleep(SAMPLING_SECONDS)

    def __enter__(self) -> PeakWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._done.set()
        self._thread.join()


def measure(folder: str) -> dict[str, float]:
    """Loads the weights of a directory and reports sizes (10^6 bytes) and seconds.

    To be called in a process of its own.
    """
    import jax

    from sapo_jax.distributed import sharding
    from sapo_jax.hub.table import hub_shapes
    from sapo_jax.hub.weights import load_params
    from sapo_jax.models import make_policy

    keys = read_model_keys(folder)
    keys["mlp_only_layers"] = tuple(keys.get("mlp_only_layers", ()))
    cfg = Model(**keys)
    policy = make_policy(cfg)
    mesh = sharding.make_mesh(Mesh())
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())  # the runtime's own memory

    before = anonymous_bytes()
    with PeakWatcher() as watcher:
        start = time.perf_counter()
        params = jax.block_until_ready(load_params(folder, policy, mesh))
        seconds = time.perf_counter() - start

    parameter_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    largest_tensor = max(4 * int(np.prod(shape)) for shape in hub_shapes(cfg).values())
    above = watcher.peak_bytes - before - parameter_bytes
    return {
        "parameters_mb": parameter_bytes / 1e6,
        "largest_tensor_mb": largest_tensor / 1e6,
        "seconds": seconds,
        "above_mb": above / 1e6,
        "above_in_largest_tensors": above / largest_tensor,
    }


def make_synthetic(folder: Path) -> None:
    """Writes random weights of the shape SYNTHETIC as a Hugging Face directory."""
    from sapo_jax.hub.table import hub_shapes
    from sapo_jax.hub.writer import write_json, write_shards

    shapes = hub_shapes(SYNTHETIC)

    def tensors() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for shape in shapes.values():
            yield rng.standard_normal(shape, np.float32)

    write_shards(folder, shapes, np.dtype(np.float32), tensors(), SHARD_BYTES)
    write_json(folder / "config.json", to_hugging_face(SYNTHETIC))


def measure_in_own_process(folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--model", folder]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {name: round(value, 2) for name, value in json.loads(done.stdout).items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="measure this directory alone, in this process, as JSON")
    folder = parser.parse_args().model
    if folder is not None:
        print(json.dumps(measure(folder)))
        return

    with tempfile.TemporaryDirectory() as synthetic:
        make_synthetic(Path(synthetic))
        folders = {"synthetic 2 GB": synthetic}
        if SMOLLM2.exists():
            folders["SmolLM2-135M"] = str(SMOLLM2)
        rows: list[dict[str, Any]] = []
        for name, folder in folders.items():
            rows.append({"model": name, **measure_in_own_process(folder)})
            print(rows[-1], flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
