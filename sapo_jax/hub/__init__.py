"""Everything in another project's format: Hugging Face model directories in and out, GGUF files in.

    load_params     a directory's safetensors -> parameters, in their shards on a mesh
    check_weights   what is wrong with a directory's safetensors, from the headers alone
    write_model     parameters, tokenizer and chat template -> a directory
    convert         a GGUF file -> a directory
    hub_shapes      the names and shapes of a model's tensors in Hugging Face's layout
    hub_tensors     parameters -> these tensors, one by one
    write_shards    tensors -> safetensors files, one tensor in memory at a time

`table.py` is the one table of what goes where. README.md here says what a directory must hold.
"""

from sapo_jax.errors import GGUFError, ModelDirError
from sapo_jax.hub.export import write_model
from sapo_jax.hub.gguf import Converted, convert
from sapo_jax.hub.table import hub_shapes
from sapo_jax.hub.weights import check_weights, hub_tensors, load_params
from sapo_jax.hub.writer import write_shards

__all__ = [
    "Converted",
    "GGUFError",
    "ModelDirError",
    "check_weights",
    "convert",
    "hub_shapes",
    "hub_tensors",
    "load_params",
    "write_model",
    "write_shards",
]
