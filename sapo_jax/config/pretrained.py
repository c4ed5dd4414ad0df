"""A Hugging Face `config.json` -> keys of our `Model`, and back.

Imports no JAX. The weights are the business of `hub/weights.py`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from sapo_jax.config.errors import show
from sapo_jax.config.schema import Model, Yarn
from sapo_jax.errors import ModelDirError

# model_type -> architecture
FAMILIES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}

_TOP_COUNT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What a key of config.json may be.

    kind: "count" (a whole number), "positive" (a finite number above 0), "bool" or "layers" (a list
        of layer numbers).
    default: what transformers takes where the file leaves the key out; _REQUIRED where we ask for
        it, because transformers' default is the shape of one published model.
    least, most: the bounds of a count. They keep a hostile file from making us count for hours.
    """

    kind: str
    default: Any
    least: int = 1
    most: int = _TOP_COUNT

    def fits(self, value: Any) -> bool:
        """Whether a value is of the kind, and within the bounds."""
        if self.kind == "bool":
            return isinstance(value, bool)
        if self.kind == "layers":
            return isinstance(value, list) and all(_is_count(i, 0, _MOST_LAYERS) for i in value)
        if self.kind == "positive":
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return is_number and 0 < value < 1e300
        return _is_count(value, self.least, self.most)

    def expected(self) -> str:
        """What a value must be, in words."""
        if self.kind == "bool":
            return "true or false"
        if self.kind == "layers":
            return f"a list of layer numbers from 0 to {_MOST_LAYERS}"
        if self.kind == "positive":
            return "a positive number"
        return f"a whole number from {self.least} to {self.most}"


def _is_count(value: Any, least: int, most: int) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and least <= value <= most


_REQUIRED = object()
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 10_000
# Layers times experts: each is three tensors to be looked for by name.
_MOST_EXPERTS_IN_ALL = 300_000

# Keys that have the same name and meaning on both sides, with the defaults of transformers 5.
_SETTINGS: dict[str, _Setting] = {
    "vocab_size": _Setting("count", _REQUIRED),
    "hidden_size": _Setting("count", _REQUIRED),
    "num_hidden_layers": _Setting("count", _REQUIRED, most=_MOST_LAYERS),
    "num_attention_heads": _Setting("count", _REQUIRED),
    "intermediate_size": _Setting("count", _REQUIRED),
    "attention_bias": _Setting("bool", False),
    "rms_norm_eps": _Setting("positive", 1e-6),
    "tie_word_embeddings": _Setting("bool", False),
    "max_position_embeddings": _Setting("count", 32768),
    "initializer_range": _Setting("positive", 0.02),
}
_LLAMA_SETTINGS: dict[str, _Setting] = {
    "max_position_embeddings": _Setting("count", 2048),
}
_MOE_SETTINGS: dict[str, _Setting] = {
    "num_experts": _Setting("count", _REQUIRED, most=_MOST_EXPERTS),
    "num_experts_per_tok": _Setting("count", _REQUIRED),
    "moe_intermediate_size": _Setting("count", _REQUIRED),
    "norm_topk_prob": _Setting("bool", False),
    "decoder_sparse_step": _Setting("count", 1),
    "mlp_only_layers": _Setting("layers", []),
}
_HEAD_SETTING = _Setting("count", None)
# Where a file leaves the key out. A family that is not named derives it: num_key_value_heads is
# num_attention_heads, head_dim is hidden_size / num_attention_heads.
_KEY_VALUE_HEADS = {"qwen3": 32, "qwen3_moe": 4}
_HEAD_DIM = {"qwen3": 128}

# What our models do. A file that wants something else is refused.
_SUPPORTED_VALUES = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
    # Attention in chunks beyond a length (Qwen's models of 1M tokens): vLLM honours it.
    "dual_chunk_attention_config": None,
}
# Keys that change no number of ours: remarks, what Python code is to return, what other keys that
# are checked switch off, and the ids that the tokenizer reads (`data/tokenizer.py`).
_HARMLESS = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "attn_implementation",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "max_window_layers",
    "model_type",
    "original_max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "sliding_window",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_CHECKED_APART = {
    "architectures",
    "attention_dropout",
    "head_dim",
    "layer_types",
    "num_key_value_heads",
    "num_local_experts",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "router_aux_loss_coef",
}
_YARN_KEYS = {field.name for field in dataclasses.fields(Yarn)}


def read_model_keys(folder: str | Path) -> dict[str, Any]:
    """The keys of `Model` that `folder`/config.json decides, as JSON values.

    Raises ModelDirError with all that is wrong with the file: keys that are missing, of another
    type or out of range, that contradict each other, or that ask for what our models do not do.
    """
    raw = read_json_object(Path(folder) / "config.json", folder)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        text = f"config.json: model_type {show(family)} is not supported"
        raise ModelDirError(folder, [f"{text}; supported are {', '.join(FAMILIES)}"])
    problems: list[str] = []
    keys: dict[str, Any] = {"qk_norm": family != "llama", "num_experts": 0}
    keys |= _settings(raw, family, problems)
    for name, supported in _SUPPORTED_VALUES.items():
        value = raw.get(name)
        if value is not None and value != supported:
            text = f"config.json: {name} {show(value)} is not supported"
            problems.append(f"{text}, only {show(supported)}")
    _check_architectures(raw, family, problems)
    _check_layer_types(raw, keys["num_hidden_layers"], problems)
    rope_keys = _rope_keys(raw, keys["max_position_embeddings"], problems)
    if not problems and keys["num_hidden_layers"] * keys["num_experts"] > _MOST_EXPERTS_IN_ALL:
        problems.append(
            f"config.json: num_hidden_layers {keys['num_hidden_layers']} times num_experts"
            f" {keys['num_experts']} is more than {_MOST_EXPERTS_IN_ALL}"
        )
    if problems:
        raise ModelDirError(folder, problems)
    return keys | rope_keys


def model_dir_notes(folder: str | Path) -> list[str]:
    """Sentences about what `folder`/config.json says and we do not take over.

    The forward pass of transformers does not read these keys either, or reads them in training
    alone. Raises ModelDirError where the file cannot be read.
    """
    raw = read_json_object(Path(folder) / "config.json", folder)
    notes = []
    dropout = raw.get("attention_dropout")
    if dropout:
        notes.append(
            f"config.json: attention_dropout {show(dropout)} is not taken over;"
            " our models have no dropout"
        )
    coefficient = raw.get("router_aux_loss_coef")
    if coefficient and raw.get("model_type") == "qwen3_moe":
        notes.append(
            f"config.json: router_aux_loss_coef {show(coefficient)} is not taken over, it is of"
            " pre-training; set model.router_aux_loss_coef to have it"
        )
    known = {*_SETTINGS, *_SUPPORTED_VALUES, *_HARMLESS, *_CHECKED_APART}
    if raw.get("model_type") == "qwen3_moe":
        known |= {*_MOE_SETTINGS}
    unknown = sorted(set(raw) - known)
    if unknown:
        notes.append(f"config.json: not known and ignored: {_some(unknown)}")
    return notes


def _some(names: list[str]) -> str:
    """The first ten names, and how many more there are."""
    text = ", ".join(name[:60] for name in names[:10])
    if len(names) > 10:
        text += f" and {len(names) - 10} more"
    return text


def _settings(raw: dict[str, Any], family: str, problems: list[str]) -> dict[str, Any]:
    """The keys of the same name on both sides, and those whose default depends on others.

    A key that is null counts as left out.
    """
    settings = dict(_SETTINGS)
    if family == "llama":
        settings |= _LLAMA_SETTINGS
    if family == "qwen3_moe":
        settings |= _MOE_SETTINGS
        raw = raw | {"num_experts": _num_experts(raw, problems)}
    keys: dict[str, Any] = {}
    for name, setting in settings.items():
        keys[name] = _checked(raw, name, setting, problems)

    heads = keys["num_attention_heads"]
    keys["num_key_value_heads"] = _checked(raw, "num_key_value_heads", _HEAD_SETTING, problems)
    if keys["num_key_value_heads"] is None:
        keys["num_key_value_heads"] = heads
        if "num_key_value_heads" not in raw:
            keys["num_key_value_heads"] = _KEY_VALUE_HEADS.get(family, heads)
    keys["head_dim"] = _checked(raw, "head_dim", _HEAD_SETTING, problems)
    if keys["head_dim"] is None and family in _HEAD_DIM:
        keys["head_dim"] = _HEAD_DIM[family]
    elif keys["head_dim"] is None and heads is not None and keys["hidden_size"] is not None:
        keys["head_dim"] = keys["hidden_size"] // heads
    return keys


def _checked(raw: dict[str, Any], name: str, setting: _Setting, problems: list[str]) -> Any:
    """The value under a key, or the default; None, and a problem, where it does not fit."""
    value = raw.get(name)
    if value is None and setting.default is _REQUIRED:
        problems.append(f"config.json: {name} is missing")
        return None
    if value is None:
        return setting.default
    if not setting.fits(value):
        problems.append(f"config.json: {name} {show(value)} is not {setting.expected()}")
        return None
    return value


def _num_experts(raw: dict[str, Any], problems: list[str]) -> Any:
    """The number of experts, which transformers 5 calls `num_local_experts`."""
    hub_name = raw.get("num_experts")
    new_name = raw.get("num_local_experts")
    if hub_name is None:
        return new_name
    if new_name is not None and new_name != hub_name:
        problems.append(
            f"config.json: num_experts {show(hub_name)} and num_local_experts {show(new_name)}"
            " contradict each other; remove the wrong one"
        )
    return hub_name


def _check_architectures(raw: dict[str, Any], family: str, problems: list[str]) -> None:
    """Refuse reward models, embedding models, drafters: their heads are not a language model's."""
    architectures = raw.get("architectures")
    if architectures and architectures != [FAMILIES[family]]:
        text = f"config.json: architectures {show(architectures)} is not supported"
        problems.append(f"{text}; a model of type {family} must be {FAMILIES[family]}")


def _check_layer_types(raw: dict[str, Any], num_layers: int | None, problems: list[str]) -> None:
    layer_types = raw.get("layer_types")
    if layer_types is None:
        return
    if not isinstance(layer_types, list):
        problems.append(f"config.json: layer_types {show(layer_types)} is not a list")
        return
    others = {show(kind) for kind in layer_types if kind != "full_attention"}
    if others:
        text = f"config.json: layer_types has {_some(sorted(others))}"
        problems.append(f"{text}; only full_attention is supported")
    elif num_layers is not None and len(layer_types) != num_layers:
        problems.append(
            f"config.json: layer_types has {len(layer_types)} entries,"
            f" num_hidden_layers is {num_layers}"
        )


def _rope_keys(
    raw: dict[str, Any], max_positions: int | None, problems: list[str]
) -> dict[str, Any]:
    """rope_theta and rope_scaling of the model; what is wrong with them is added to `problems`.

    Two layouts are read: that of files on the hub (rope_theta and rope_scaling beside the other
    keys) and that of transformers 5 (both in rope_parameters). A file may have both, as long as
    they say the same: transformers takes rope_scaling then, other programs rope_parameters.
    """
    problems_before = len(problems)
    readings = {}
    for where in ("rope_parameters", "rope_scaling"):
        section = raw.get(where)
        if section in (None, {}):
            continue
        if not isinstance(section, dict):
            problems.append(f"config.json: {where} {show(section)} is not an object")
            continue
        readings[where] = _read_rope(raw, where, section, max_positions, problems)
    if len(problems) > problems_before:
        return {}
    if not readings:
        return _read_rope(raw, "rope_scaling", {}, max_positions, problems)
    first, *others = readings.values()
    if others and others[0] != first:
        problems.append(
            "config.json: rope_parameters and rope_scaling are both there and differ; remove the"
            " wrong one"
        )
    return first


def _read_rope(
    raw: dict[str, Any],
    where: str,
    section: dict[str, Any],
    max_positions: int | None,
    problems: list[str],
) -> dict[str, Any]:
    """What one of the two sections says of rope_theta and rope_scaling."""
    scaling = {name: value for name, value in section.items() if value is not None}
    theta_inside = scaling.pop("rope_theta", None)
    theta_beside = raw.get("rope_theta")
    if theta_inside is not None and theta_beside is not None and theta_inside != theta_beside:
        problems.append(
            f"config.json: rope_theta {show(theta_beside)} and {where}.rope_theta"
            f" {show(theta_inside)} contradict each other; remove the wrong one"
        )
    theta = theta_inside
    if theta is None:
        theta = theta_beside
    if theta is None:
        theta = 1e4
    if not _Setting("positive", None).fits(theta):
        problems.append(f"config.json: rope_theta {show(theta)} is not a positive number")
        return {}
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"config.json: {where}.partial_rotary_factor is not supported, only 1.0")

    # Older files call the type `type`; there may be both.
    old_type = scaling.pop("type", None)
    rope_type = scaling.pop("rope_type", None)
    if rope_type is not None and old_type is not None and rope_type != old_type:
        problems.append(
            f"config.json: {where}.rope_type {show(rope_type)} and {where}.type {show(old_type)}"
            " contradict each other; remove the wrong one"
        )
    if rope_type is None:
        rope_type = old_type
    if rope_type in (None, "default") and not scaling:
        return {"rope_theta": float(theta), "rope_scaling": None}
    if rope_type in (None, "default"):
        problems.append(
            f"config.json: {where} has {_some(sorted(scaling))}, which belongs to another rope_type"
            " than default; name the type (yarn), or remove it"
        )
        return {}
    if rope_type != "yarn":
        text = f"config.json: {where} of type {show(rope_type)} is not supported"
        problems.append(f"{text}, only default and yarn")
        return {}
    return {"rope_theta": float(theta)} | _read_yarn(raw, where, scaling, max_positions, problems)


def _read_yarn(
    raw: dict[str, Any],
    where: str,
    scaling: dict[str, Any],
    max_positions: int | None,
    problems: list[str],
) -> dict[str, Any]:
    """{"rope_scaling": ...} of a section of type yarn, without its type and rope_theta."""
    if scaling.pop("truncate", True) is not True:
        problems.append(f"config.json: {where}.truncate false is not supported")
        return {}
    unknown = sorted(set(scaling) - _YARN_KEYS)
    if unknown:
        problems.append(f"config.json: {where} has {_some(unknown)}, which is not supported")
        return {}
    length_beside = raw.get("original_max_position_embeddings")
    length = scaling.get("original_max_position_embeddings")
    if length_beside is not None and length is not None and length != length_beside:
        problems.append(
            f"config.json: original_max_position_embeddings {show(length_beside)} and that of"
            f" {where}, {show(length)}, contradict each other; remove the wrong one"
        )
    if length is None:
        length = length_beside
    if length is None:
        length = max_positions
    scaling["original_max_position_embeddings"] = length
    if "factor" not in scaling:
        problems.append(f"config.json: {where}.factor is missing")
    for name, value in scaling.items():
        kind = "positive"
        if name == "original_max_position_embeddings":
            kind = "count"
        setting = _Setting(kind, None)
        if value is not None and not setting.fits(value):
            text = f"config.json: {where}.{name} {show(value)} is not {setting.expected()}"
            problems.append(text)
    return {"rope_scaling": scaling}


def to_hugging_face(model: Model) -> dict[str, Any]:
    """The config.json of a model, in the hub's layout, which transformers 4 and 5, vLLM and others
    read.

    Raises ValueError for a shape that no Hugging Face family has: experts without qk-norm.
    """
    if model.num_experts and not model.qk_norm:
        raise ValueError(
            "Hugging Face has no model with experts but without qk_norm: it cannot be exported"
        )
    if model.num_experts:
        family = "qwen3_moe"
    elif model.qk_norm:
        family = "qwen3"
    else:
        family = "llama"

    names = [*_SETTINGS, "num_key_value_heads", "head_dim", "rope_theta"]
    if model.num_experts:
        names += _MOE_SETTINGS
    shape = {}
    for name in names:
        value = getattr(model, name)
        shape[name] = list(value) if isinstance(value, tuple) else value

    scaling = None
    if model.rope_scaling is not None:
        given = {k: v for k, v in vars(model.rope_scaling).items() if v is not None}
        scaling = {"rope_type": "yarn", **given}
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        **shape,
        "rope_scaling": scaling,
        "hidden_act": "silu",
    }


def read_json_object(path: Path, folder: str | Path) -> dict[str, Any]:
    """The object in a JSON file of the model directory `folder`.

    Raises ModelDirError where there is none, or an object in the file gives a key twice.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise ModelDirError(folder, [f"{path.name}: not a file"])
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=_without_repeated_keys)
    except FileNotFoundError:
        text = f"there is no {path.name}; a Hugging Face model directory has one"
        raise ModelDirError(folder, [text]) from None
    except ModelDirError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelDirError(folder, [f"{path.name}: not a JSON file: {error}"]) from error
    if not isinstance(value, dict):
        raise ModelDirError(folder, [f"{path.name}: not a JSON object"])
    return value


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file. Raises ValueError for a key that it gives twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated[:60]!r} is given twice")
    return values
