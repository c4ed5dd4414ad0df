"""The dry run: what a configuration amounts to in parameters, tokens, FLOPs and memory.

Everything here is arithmetic on the configuration. Nothing is compiled and JAX is not imported, so
that `sapo-jax config` answers at once.

All figures are upper bounds: every prompt has `max_prompt_tokens` and every completion
`max_new_tokens`. Symbols are those of the shape legend in `types.py`: P prompts with G completions
each make B = P G sequences of T = S + C tokens, S of the prompt and C of the completion. The model
has L layers, width D, H query heads and K key heads of width h, MLP width F, E experts of which a
token uses k, and a vocabulary of V.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sapo_jax.config import Config, dump, warnings
from sapo_jax.config.schema import Model, Train
from sapo_jax.models.size import (
    causal_keys,
    expert_parameters,
    head_flops,
    layer_flops,
    parameter_count,
    routing_bytes,
)
from sapo_jax.ops.tiles import LANES, PAGE, SHORT
from sapo_jax.plan.units import GiB
from sapo_jax.rollout.cache_width import cache_widths

FLOAT32_BYTES = 4


# ---------------------------------------------------------------- FLOPs


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of one RL step, over all devices."""

    rollout: float
    scoring: float
    update: float

    @property
    def total(self) -> float:
        return self.rollout + self.scoring + self.update


def flops(cfg: Config, vocab_size: int) -> Flops:
    """The FLOPs of one RL step.

    Each weight costs a multiplication and an addition per token, 2 N; each key that a token attends
    to costs 4 H h in every layer. N counts the active parameters without the token table, which is
    looked up and not multiplied. The output head, V D, is counted only for tokens whose next token
    is predicted.

        forward  = 2 N' tokens + 4 L H h keys + 2 V D predictions,  N' being N without the head
        rollout  = forward of P prompts, which predict nothing, and of B C decoded tokens:
                   the prompt's last token once more, then all of the completion but its last
        scoring  = forward of B sequences of T tokens, once for the old policy (if old_logp is
                   scorer), once for a KL reference, and once every live_mismatch_every steps
        update   = epochs * (3 * forward of B sequences of T tokens + what is recomputed);
                   backward costs twice as much as forward: 6 N together

    What is recomputed in the backward pass depends on `model.remat`: the head always; with `dots`
    the gate and up projections of experts; with `attention` everything but attention; with `full`
    everything. Attention of short rows (see ops.attention, on a CPU) is recomputed with every
    setting but `none`.
    """
    model = cfg.model
    P = cfg.rollout.prompts_per_step
    B = P * cfg.rollout.group_size
    S = cfg.data.max_prompt_tokens
    C = cfg.rollout.max_new_tokens
    T = S + C
    layers = layer_flops(model)
    head_per_token = head_flops(model, vocab_size)

    # Rollout.
    prefill = P * (S * layers.per_token + causal_keys(S) * layers.per_key)
    keys_while_decoding = causal_keys(T - 1) - causal_keys(S - 1)
    decode_sequence = C * (layers.per_token + head_per_token) + keys_while_decoding * layers.per_key
    decode = B * decode_sequence

    # One forward pass of all sequences.
    matrices = B * T * layers.per_token
    attention = B * causal_keys(T) * layers.per_key
    head = B * (T - 1) * head_per_token
    forward = matrices + attention + head

    # Scoring.
    scoring = _scoring_passes(cfg) * forward

    # Updates.
    short_attention = 0.0
    if T <= SHORT:
        short_attention = attention
    if model.remat == "none":
        recomputed = 0
    elif model.remat == "dots":
        recomputed = B * T * _gate_and_up_flops(model) + short_attention
    elif model.remat == "attention":
        recomputed = matrices + short_attention
    else:
        recomputed = matrices + attention
    update = cfg.train.epochs * (3 * forward + recomputed + head)

    return Flops(rollout=prefill + decode, scoring=scoring, update=update)


def _scoring_passes(cfg: Config) -> float:
    """Forward passes over all sequences that an RL step makes before its updates, on average."""
    passes = 0.0
    if cfg.train.old_logp == "scorer":
        passes += 1
    if cfg.loss.kl != "none":
        passes += 1
    if cfg.train.live_mismatch_every:
        passes += 1 / cfg.train.live_mismatch_every
    return passes


def _gate_and_up_flops(model: Model) -> int:
    """FLOPs of the gate and up projections of experts, for one token in all sparse layers.

    The two projections of one expert take 2 * 2 D F.
    """
    experts_of_a_token = sum(model.sparse_layers) * model.num_experts_per_tok
    return experts_of_a_token * 4 * model.hidden_size * model.moe_intermediate_size


# ---------------------------------------------------------------- memory


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. The dry run prints the fields in this order."""

    parameters: float  # float32
    moments: float  # AdamW's two moments, float32
    reference: float  # parameters of the KL reference
    gradients: float  # float32; twice as much while the gradients of micro-batches are added up
    # What is kept for the backward pass, and the one layer that is being worked on.
    activations: float
    logits: float  # of one slice of the vocabulary, and their gradient
    kv_cache: float
    decode_weights: float  # layers and head, laid out for the decode loop in the compute dtype
    recorded_experts: float  # r3: expert ids of the whole rollout, while it is sampled
    replayed_experts: float  # expert ids of a mini-batch (routing_on: host) or of the whole rollout

    @property
    def resident(self) -> float:
        """What is on the device all the time."""
        return self.parameters + self.moments + self.reference

    @property
    def update(self) -> float:
        """What is on the device during an update."""
        work = self.gradients + self.activations + self.logits + self.replayed_experts
        return self.resident + work

    @property
    def rollout(self) -> float:
        """What is on the device during a rollout."""
        return self.resident + self.decode_weights + self.kv_cache + self.recorded_experts

    @property
    def peak(self) -> float:
        return max(self.update, self.rollout)


def memory(cfg: Config, vocab_size: int) -> Memory:
    """An estimate of the bytes on one device.

    It is good enough to tell what fits from what does not; `sapo-jax plan` measures the compiled
    programs. Parameters are split over the mesh axes fsdp and tensor, those of experts also over
    expert. Sequences are split over data, fsdp and expert, where `mesh.data: 0` counts as 1. Rows
    are counted as one sequence each, or as `train.row_tokens`.
    """
    model = cfg.model
    T = cfg.train.row_tokens or cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    shards = cfg.mesh.sequence_shards

    parameters = _parameter_bytes(cfg, vocab_size)
    reference = 0.0
    if cfg.loss.kl != "none":
        reference = parameters
    gradient_copies = 2 if cfg.train.micro_batch else 1

    sequences_per_rollout = cfg.rollout.prompts_per_step * cfg.rollout.group_size
    sequences_per_mini_batch = sequences_per_rollout // cfg.train.mini_batches
    rows_at_a_time = cfg.train.micro_batch or sequences_per_mini_batch
    if cfg.cold_start.steps:
        rows_at_a_time = max(rows_at_a_time, cfg.cold_start.batch_size)
    rows_on_device = rows_at_a_time / shards

    # A slice of the vocabulary has float32 logits and as many gradients.
    logits_per_token = min(vocab_size, model.vocab_chunk)
    logits = 2 * FLOAT32_BYTES * rows_on_device * T * logits_per_token

    expert_ids_of_a_sequence = routing_bytes(model) * T / shards
    recorded_sequences = 0
    if cfg.train.routing_replay == "r3":
        recorded_sequences = cfg.rollout.prompts_in_flight * cfg.rollout.group_size
    if cfg.train.routing_replay == "none":
        replayed_sequences = 0
    elif cfg.train.routing_on == "host":
        replayed_sequences = sequences_per_mini_batch
    else:
        replayed_sequences = sequences_per_rollout

    return Memory(
        parameters=parameters,
        moments=2 * parameters,
        reference=reference,
        gradients=parameters * gradient_copies,
        activations=_activation_bytes(cfg, rows_on_device, T),
        logits=logits,
        kv_cache=_kv_cache_bytes(cfg),
        decode_weights=_decode_weight_bytes(cfg, vocab_size),
        recorded_experts=recorded_sequences * expert_ids_of_a_sequence,
        replayed_experts=replayed_sequences * expert_ids_of_a_sequence,
    )


def _compute_itemsize(model: Model) -> int:
    """Bytes of a number in the compute dtype."""
    return 4 if model.compute_dtype == "float32" else 2


def _parameter_bytes(cfg: Config, vocab_size: int) -> float:
    """Bytes of the float32 parameters on one device."""
    model = cfg.model
    mesh = cfg.mesh
    in_experts = sum(model.sparse_layers) * model.num_experts * expert_parameters(model)
    elsewhere = parameter_count(model, vocab_size).total - in_experts
    before_split = elsewhere + in_experts / mesh.expert
    return FLOAT32_BYTES * before_split / (mesh.fsdp * mesh.tensor)


def _activation_bytes(cfg: Config, rows: float, T: int) -> float:
    """Bytes of activations on a device that works on `rows` rows of T tokens.

    They are what is kept for the backward pass, and the layer that is being worked on.

    What is kept of each layer depends on `model.remat`: with `none` all that it computes; with
    `dots` the results of attention and of all matmuls but those of experts; with `attention` the
    layer's input and attention's output; with `full` its input alone. All settings but `none` also
    hold one whole layer, the one that is being recomputed.
    """
    model = cfg.model
    tensor_shards = cfg.mesh.tensor
    tokens = rows * T
    layers = [
        _layer_activations(model, is_sparse, tokens, T, tensor_shards)
        for is_sparse in model.sparse_layers
    ]
    everything = sum(layer.everything for layer in layers)
    matmul_results = sum(layer.matmul_results for layer in layers)
    inputs = sum(layer.input for layer in layers)

    tokens_with_kept_attention = 0.0
    if T > SHORT:
        tokens_with_kept_attention = tokens
    attention_outputs = (
        model.num_hidden_layers
        * tokens_with_kept_attention
        * _compute_itemsize(model)
        * model.num_attention_heads
        * model.head_dim
        / tensor_shards
    )

    if model.remat == "none":
        return everything
    if model.remat == "dots":
        kept = matmul_results + attention_outputs
    elif model.remat == "attention":
        kept = inputs + attention_outputs
    else:
        kept = inputs
    being_recomputed = max(layer.everything for layer in layers)
    return kept + being_recomputed


@dataclasses.dataclass(frozen=True)
class _LayerActivations:
    """Bytes of one layer's activations on one device."""

    everything: float  # all that the layer computes
    matmul_results: float  # the results of its matmuls, without those of experts
    input: float


def _layer_activations(
    model: Model, is_sparse: bool, tokens: float, T: int, tensor_shards: int
) -> _LayerActivations:
    """The activations of one layer for `tokens` tokens in rows of T.

    Per token there are
    - the residual stream and the results of the norms, 4 D;
    - q, k and v as projected, then normed and rotated, and attention's output, 3 (H + K) h;
    - in short rows the scores (float32) and the probabilities, H T each;
    - SwiGLU's gate, up and their product, 3 F; with experts k times that, and their rows, which are
      also copied in and out, 2 k D.
    """
    itemsize = _compute_itemsize(model)
    D = model.hidden_size
    H = model.num_attention_heads
    K = model.num_key_value_heads
    h = model.head_dim
    if is_sparse:
        expert_copies = model.num_experts_per_tok
        F = expert_copies * model.moe_intermediate_size
        kept_of_mlp = 0
    else:
        expert_copies = 0
        F = model.intermediate_size
        kept_of_mlp = 2 * F  # gate and up

    scores = 0
    if T <= SHORT:
        scores = (FLOAT32_BYTES + itemsize) * H * T

    whole_width = 4 * D + 2 * expert_copies * D
    split_over_tensor = (3 * (H + K) * h + 3 * F) / tensor_shards
    everything = itemsize * (whole_width + split_over_tensor) + scores / tensor_shards

    kept_projections = ((H + 2 * K) * h + kept_of_mlp) / tensor_shards
    matmul_results = itemsize * (3 * D + kept_projections)

    return _LayerActivations(
        everything=tokens * everything,
        matmul_results=tokens * matmul_results,
        input=tokens * itemsize * D,
    )


def _kv_cache_bytes(cfg: Config) -> float:
    """Bytes of the KV cache on one device (see rollout.decode).

    It is that of a rollout or of an evaluation batch, whichever has more columns.
    """
    model = cfg.model
    rollout_completions = cfg.rollout.prompts_in_flight * cfg.rollout.group_size
    evaluated_prompts = min(cfg.evaluate.batch_prompts, cfg.data.held_out)
    evaluated_completions = evaluated_prompts * cfg.evaluate.samples
    most_columns = max(
        _cache_columns(cfg, rollout_completions), _cache_columns(cfg, evaluated_completions)
    )
    columns_on_device = most_columns / cfg.mesh.sequence_shards

    keys_and_values = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    bytes_per_column = keys_and_values / cfg.mesh.tensor * _compute_itemsize(model)
    return columns_on_device * bytes_per_column


def _cache_columns(cfg: Config, completions: int) -> int:
    """Columns of the KV cache for so many completions, over all devices.

    All slots have their columns, and so do the prompts of completions that wait for a slot (see
    rollout.decode).
    """
    S = cfg.data.max_prompt_tokens
    C = cfg.rollout.max_new_tokens
    slots = min(cfg.rollout.slots or completions, completions)
    some_wait = completions > slots

    # On a TPU decoding reads such heads by pages: see ops.attention.cache_page_size.
    is_paged = cfg.model.compute_dtype == "bfloat16" and cfg.model.head_dim % LANES == 0
    page = 1
    if is_paged:
        page = PAGE
    widest = cache_widths(S, C, some_wait, page)[-1]

    waiting_prompt_columns = 0
    if some_wait:
        prompts = -(-completions // cfg.rollout.group_size)  # rounded up
        waiting_prompt_columns = prompts * S
    return slots * widest + waiting_prompt_columns


def _decode_weight_bytes(cfg: Config, vocab_size: int) -> float:
    """Bytes on one device of the weights that are laid out for the decode loop.

    Attention is split over tensor; MLPs and the head are also split over fsdp; experts over all
    three axes.
    """
    model = cfg.model
    mesh = cfg.mesh
    num_sparse = sum(model.sparse_layers)
    num_dense = model.num_hidden_layers - num_sparse
    experts = num_sparse * model.num_experts * expert_parameters(model)
    mlps = num_dense * 3 * model.hidden_size * model.intermediate_size
    attention = parameter_count(model, vocab_size=0).total - experts - mlps
    head = vocab_size * model.hidden_size

    tensor_and_fsdp = mesh.tensor * mesh.fsdp
    numbers_on_device = (
        attention / mesh.tensor
        + (mlps + head) / tensor_and_fsdp
        + experts / (tensor_and_fsdp * mesh.expert)
    )
    return _compute_itemsize(model) * numbers_on_device


# ---------------------------------------------------------------- the text


def describe(cfg: Config, vocab_size: int) -> str:
    """The dry run's text: the resolved configuration, then sizes, costs and warnings.

    The configuration is YAML, and all that follows are YAML comments, so the text can be loaded.

    `vocab_size` is the tokenizer's; `model.vocab_size` wins if it is set.
    """
    V = cfg.model.vocab_size or vocab_size
    memory_title = f"memory on one device, estimated ({_mesh_text(cfg)})"
    blocks = {
        "parameters": _parameter_lines(cfg, V),
        "one RL step, at most": _step_lines(cfg, V),
        memory_title: _memory_lines(cfg, V),
        "the whole run": _run_lines(cfg, V),
    }
    lines = [dump(cfg).rstrip()]
    for title, entries in blocks.items():
        lines.append("")
        lines.append(f"# {title}")
        for name, value in entries.items():
            lines.append(f"#   {name:<20} {value}")
    notes = warnings(cfg)
    lines.append("")
    lines.append(f"# warnings: {len(notes) or 'none'}")
    for note in notes:
        lines.append(f"#   {note}")
    return "\n".join(lines) + "\n"


def _parameter_lines(cfg: Config, vocab_size: int) -> dict[str, str]:
    count = parameter_count(cfg.model, vocab_size)
    return {
        "total": _short_number(count.total),
        "active per token": _short_number(count.active),
        "embedding and head": f"{_short_number(count.embedding)}  (vocabulary {vocab_size})",
    }


def _step_lines(cfg: Config, vocab_size: int) -> dict[str, str]:
    P = cfg.rollout.prompts_per_step
    G = cfg.rollout.group_size
    S = cfg.data.max_prompt_tokens
    C = cfg.rollout.max_new_tokens
    cost = flops(cfg, vocab_size)
    sequences_each = P * G // cfg.train.mini_batches
    lines = {
        "prompts": f"{P} x {S} = {_short_number(P * S)} tokens",
        "completions": f"{P} x {G} x {C} = {_short_number(P * G * C)} tokens",
        "optimiser steps": f"{_optimiser_steps(cfg.train)} on {sequences_each} sequences each",
        "rollout": _short_number(cost.rollout, "FLOP"),
        "scoring": _short_number(cost.scoring, "FLOP"),
        "update": _short_number(cost.update, "FLOP"),
        "together": _short_number(cost.total, "FLOP"),
    }
    if cfg.train.routing_replay != "none":
        lines["experts to replay"] = _replay_text(cfg)
    return lines


def _memory_lines(cfg: Config, vocab_size: int) -> dict[str, str]:
    estimate = memory(cfg, vocab_size)
    lines = {}
    for name, size in dataclasses.asdict(estimate).items():
        lines[name.replace("_", " ")] = _gib_text(size)
    lines["during rollout"] = _gib_text(estimate.rollout)
    lines["during update"] = _gib_text(estimate.update)
    return lines


def _run_lines(cfg: Config, vocab_size: int) -> dict[str, str]:
    steps = cfg.train.steps
    optimiser_steps = steps * _optimiser_steps(cfg.train)
    completions = steps * cfg.rollout.prompts_per_step * cfg.rollout.group_size
    tokens = completions * cfg.rollout.max_new_tokens
    total_flops = steps * flops(cfg, vocab_size).total
    return {
        "RL steps": str(steps),
        "optimiser steps": f"{optimiser_steps}  (and {cfg.cold_start.steps} of cold start)",
        "completions": f"{_short_number(completions)}, at most {_short_number(tokens)} tokens",
        "FLOP": _short_number(total_flops, "FLOP"),
    }


def _optimiser_steps(train: Train) -> int:
    """Optimiser steps of one RL step."""
    return train.mini_batches * train.epochs


def _replay_text(cfg: Config) -> str:
    """How many bytes the recorded experts of a rollout take, and where they wait."""
    bytes_per_token = routing_bytes(cfg.model)
    layers = sum(cfg.model.sparse_layers)
    k = cfg.model.num_experts_per_tok
    sequences = cfg.rollout.prompts_per_step * cfg.rollout.group_size
    tokens = sequences * (cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens)
    bytes_per_id = bytes_per_token // (layers * k)
    ids = f"{layers} layers x {k} ids of {bytes_per_id} B"
    total = _gib_text(tokens * bytes_per_token)
    return f"{bytes_per_token} B per token ({ids}), {total}, on the {cfg.train.routing_on}"


def splitting_axes(sizes: Mapping[str, int]) -> str:
    """The mesh axes that split something: `fsdp 2 x tensor 4`."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def _mesh_text(cfg: Config) -> str:
    axes = splitting_axes(dataclasses.asdict(cfg.mesh))
    if cfg.mesh.data == 0:
        return f"{axes}, data: all that are left, counted as 1"
    return axes


def _short_number(number: float, unit: str = "") -> str:
    """A number with three digits and a prefix: 1234567 -> "1.23 M".

    Without a unit 10^9 is a billion, B; with a unit it is giga, G.
    """
    giga = "G" if unit else "B"
    prefixes = {1e18: "E", 1e15: "P", 1e12: "T", 1e9: giga, 1e6: "M", 1e3: "k"}
    for scale, prefix in prefixes.items():
        if number >= scale:
            return f"{number / scale:.3g} {prefix}{unit}"
    return f"{number:g} {unit}".rstrip()


def _gib_text(number: float) -> str:
    return f"{number / GiB:.3f} GiB"
