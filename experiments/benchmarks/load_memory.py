"""Peak host memory of loading Hugging Face weights, above the model's own share.

    python experiments/benchmarks/load_memory.py                # a 2 GB model made here; SmolLM2, after `make smollm2`
    python experiments/benchmarks/load_memory.py --model DIR    # this one

Hardware: any; 3 GB of memory and disk, a minute. Expected: the last column below 2. Writes results/load_memory.csv.

Counted is anonymous memory (RssAnon), sampled every 2 ms: pages of the mapped files belong to the page cache, which the
kernel takes back at will. On a CPU the parameters themselves are host memory; they are subtracted.
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
from pathlib import Path

import numpy as np

from sapo_jax.config import Mesh, Model, read_model_keys, to_hugging_face

RESULTS = Path(__file__).parents[1] / "results" / "load_memory.csv"
SMOLLM2 = Path(".cache/smollm2/model")
SYNTHETIC = Model(  # 0.5 B parameters in float32: 2 GB
    vocab_size=64000, hidden_size=1280, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=8,
    head_dim=80, intermediate_size=3456,
)  # fmt: skip


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell RssAnon")


def measure(folder: str) -> dict[str, float]:
    """In a process of its own: load, and report bytes."""
    import jax

    from sapo_jax.distributed import sharding
    from sapo_jax.hub.weights import hub_shapes, load_params
    from sapo_jax.models import make_policy

    cfg = Model(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in read_model_keys(folder).items()}
    )
    policy, mesh = make_policy(cfg), sharding.make_mesh(Mesh())
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())  # the runtime's own memory
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    params = jax.block_until_ready(load_params(folder, policy, mesh))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    share = sum(x.nbytes for x in jax.tree.leaves(params))
    largest = max(4 * int(np.prod(shape)) for shape in hub_shapes(cfg).values())
    return {
        "parameters_mb": share / 1e6, "largest_tensor_mb": largest / 1e6, "seconds": seconds,
        "above_mb": (peak - before - share) / 1e6, "above_in_largest_tensors": (peak - before - share) / largest,
    }  # fmt: skip


def make_synthetic(folder: Path) -> None:
    from sapo_jax.hub.weights import hub_shapes
    from sapo_jax.hub.writer import write_json, write_shards

    rng, shapes = np.random.default_rng(0), hub_shapes(SYNTHETIC)
    tensors = (rng.standard_normal(shape, np.float32) for shape in shapes.values())
    write_shards(folder, shapes, np.dtype(np.float32), tensors, 10**9)
    write_json(folder / "config.json", to_hugging_face(SYNTHETIC))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="measure this directory alone, in this process, as JSON")
    if (folder := parser.parse_args().model) is not None:
        print(json.dumps(measure(folder)))
        return
    with tempfile.TemporaryDirectory() as made:
        make_synthetic(Path(made))
        folders = {"synthetic 2 GB": made} | (
            {"SmolLM2-135M": str(SMOLLM2)} if SMOLLM2.exists() else {}
        )
        rows = []
        for name, folder in folders.items():
            out = subprocess.run(
                [sys.executable, __file__, "--model", folder],
                check=True,
                capture_output=True,
                text=True,
            )
            rows.append(
                {"model": name, **{k: round(v, 2) for k, v in json.loads(out.stdout).items()}}
            )
            print(rows[-1], flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
