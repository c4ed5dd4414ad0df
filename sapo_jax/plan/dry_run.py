"""The dry run: what a configuration amounts to in parameters, tokens, FLOPs and memory. Arithmetic; compiles nothing.

All figures are bounds: every prompt has `max_prompt_tokens`, every completion `max_new_tokens`. Symbols as in types.py:
P prompts, G completions each, B = P G; S prompt, C completion, T = S + C tokens; L layers, D width, H and K heads of
width h, F mlp width, E experts of which k are used, V vocabulary.
"""

from __future__ import annotations

import dataclasses

from sapo_jax.config import Config, Model, dump, warnings
from sapo_jax.models.size import _expert, layer_flops, parameter_count, routing_bytes
from sapo_jax.ops.tiles import LANES, PAGE, SHORT
from sapo_jax.rollout.cache_width import widths

GiB = 2**30


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
    """A multiplication and an addition per weight and token, 2 N, and 4 H h per layer, token and key attended to.

    N are the active parameters but the table. The head V D counts only for tokens whose next one is predicted.

        forward  = 2 N' tokens + 4 L H h keys + 2 V D predictions,   N' = N without the head
        rollout  = forward of P prompts, which predict nothing, and of B C decoded tokens: the prompt's last one again,
                   then all but the completion's last
        scoring  = forward of B sequences of T, once for the old policy (old_logp: scorer), once for a KL reference,
                   once every live_mismatch_every steps
        update   = epochs * forward of B sequences of T * 3 (backward is twice a forward: 6 N), plus what is
                   recomputed: the head always, experts' gate and up with remat `dots`, all but attention with
                   `attention`, all of it with `full`; attention of short rows (kernels.attention on CPU) with any but
                   `none`
    """
    model, P, B = (
        cfg.model,
        cfg.rollout.prompts_per_step,
        cfg.rollout.prompts_per_step * cfg.rollout.group_size,
    )
    S, C = cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens
    T = S + C
    body, key = layer_flops(model)
    head = 2 * vocab_size * model.hidden_size

    keys_of = lambda n: n * (n + 1) / 2  # causal: token t attends to t keys
    prefill = P * (S * body + keys_of(S) * key)
    decode = B * (C * (body + head) + (keys_of(T - 1) - keys_of(S - 1)) * key)
    every = cfg.train.live_mismatch_every
    passes = (
        (cfg.train.old_logp == "scorer") + (cfg.loss.kl != "none") + (1 / every if every else 0)
    )
    in_body, in_keys, in_head = B * T * body, B * keys_of(T) * key, B * (T - 1) * head
    of_short = in_keys if T <= SHORT else 0
    sparse, k = sum(model.sparse_layers), model.num_experts_per_tok
    hidden = B * T * sparse * k * 4 * model.hidden_size * model.moe_intermediate_size
    again = {
        "none": 0,
        "dots": hidden + of_short,
        "attention": in_body + of_short,
        "full": in_body + in_keys,
    }
    update = cfg.train.epochs * (3 * (in_body + in_keys + in_head) + again[model.remat] + in_head)
    return Flops(prefill + decode, passes * (in_body + in_keys + in_head), update)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: float  # float32
    moments: float  # AdamW's two, float32
    reference: float  # parameters of the KL reference
    gradients: float  # float32; twice while micro-batches are added up
    activations: float  # kept for the backward pass, and one layer being worked on
    logits: float  # one slice of the vocabulary, and its gradient
    kv_cache: float
    decode_weights: float  # layers and head, laid out for the decode loop in the compute dtype
    recorded_experts: float  # r3: ids of the whole rollout, while it is sampled
    replayed_experts: float  # ids of a mini-batch (routing_on: host) or of the whole rollout

    @property
    def resident(self) -> float:
        return self.parameters + self.moments + self.reference

    @property
    def update(self) -> float:
        return (
            self.resident + self.gradients + self.activations + self.logits + self.replayed_experts
        )

    @property
    def rollout(self) -> float:
        return self.resident + self.decode_weights + self.kv_cache + self.recorded_experts

    @property
    def peak(self) -> float:
        return max(self.update, self.rollout)


def memory(cfg: Config, vocab_size: int) -> Memory:
    """An estimate, good to tell what fits from what does not; `sapo-jax plan` measures the compiled programs.

    Parameters are split over fsdp * tensor, experts also over expert; sequences over data * fsdp * expert
    (`mesh.data: 0` counts as 1). Rows are counted as one sequence each, or as train.row_tokens. Activations of n rows
    on a device: with remat `none` all that a layer computes, with `dots` the results of attention and of all matmuls
    but experts', with `full` its input, with `attention` also attention's output; all but `none` also hold one layer
    that is being recomputed. The KV cache is that of the rollout or of an evaluation batch, whichever has more; see
    rollout.decode.
    """
    model, mesh = cfg.model, cfg.mesh
    T = cfg.train.row_tokens or cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    shards = max(1, mesh.data) * mesh.fsdp * mesh.expert
    itemsize = 4 if model.compute_dtype == "float32" else 2
    count = parameter_count(model, vocab_size)

    in_experts = sum(model.sparse_layers) * model.num_experts * _expert(model)
    split = mesh.fsdp * mesh.tensor
    parameters = 4 * ((count.total - in_experts) + in_experts / mesh.expert) / split

    mini = cfg.rollout.prompts_per_step * cfg.rollout.group_size // cfg.train.mini_batches
    rows = cfg.train.micro_batch or mini
    n = max(rows, cfg.cold_start.batch_size if cfg.cold_start.steps else 0) / shards
    layer_bytes = [
        _layer_bytes(model, sparse, n * T, T, itemsize, mesh.tensor)
        for sparse in model.sparse_layers
    ]
    everything, results, inputs = (sum(kinds) for kinds in zip(*layer_bytes, strict=True))
    kept = n * T if T > SHORT else 0  # tokens whose attention is kept
    attended = (
        model.num_hidden_layers
        * kept
        * itemsize
        * model.num_attention_heads
        * model.head_dim
        / mesh.tensor
    )
    activations = {
        "none": everything, "dots": results + attended, "attention": inputs + attended, "full": inputs
    }[model.remat]  # fmt: skip
    activations += 0 if model.remat == "none" else max(all_of_it for all_of_it, _, _ in layer_bytes)

    evaluated = min(cfg.evaluate.batch_prompts, cfg.data.held_out) * cfg.evaluate.samples
    rollout = cfg.rollout.prompts_per_step * cfg.rollout.group_size
    columns = max(_columns(cfg, n) for n in (rollout, evaluated)) / shards
    per_token = (
        2
        * model.num_hidden_layers
        * model.num_key_value_heads
        * model.head_dim
        / mesh.tensor
        * itemsize
    )
    replay = cfg.train.routing_replay
    experts = routing_bytes(model) * T / shards
    return Memory(
        parameters=parameters,
        moments=2 * parameters,
        reference=parameters if cfg.loss.kl != "none" else 0,
        gradients=parameters * (2 if cfg.train.micro_batch else 1),
        activations=activations,
        logits=2 * 4 * n * T * min(vocab_size, model.vocab_chunk),
        kv_cache=columns * per_token,
        decode_weights=_decode_weights(cfg, vocab_size, itemsize),
        recorded_experts=rollout * experts if replay == "r3" else 0,
        replayed_experts=(mini if cfg.train.routing_on == "host" else rollout) * experts
        if replay != "none"
        else 0,
    )


def _columns(cfg: Config, n: int) -> int:
    """Of the KV cache, for n completions: in all slots, and of prompts that wait for one (see rollout.decode)."""
    S, C, slots = (
        cfg.data.max_prompt_tokens,
        cfg.rollout.max_new_tokens,
        min(cfg.rollout.slots or n, n),
    )
    waiting = -(-n // cfg.rollout.group_size) * S if n > slots else 0
    paged = (
        cfg.model.compute_dtype == "bfloat16" and cfg.model.head_dim % LANES == 0
    )  # on TPU, see kernels.page
    return slots * widths(S, C, n > slots, PAGE if paged else 1)[-1] + waiting


def _decode_weights(cfg: Config, vocab_size: int, itemsize: int) -> float:
    """Bytes on one device: attention is split over tensor; MLPs and head over fsdp, too; experts over all three."""
    model, mesh = cfg.model, cfg.mesh
    sparse, split = sum(model.sparse_layers), mesh.tensor * mesh.fsdp
    experts = sparse * model.num_experts * _expert(model)
    mlps = (model.num_hidden_layers - sparse) * 3 * model.hidden_size * model.intermediate_size
    attention = parameter_count(model, 0).total - experts - mlps
    head = vocab_size * model.hidden_size
    return itemsize * (
        attention / mesh.tensor + (mlps + head) / split + experts / (split * mesh.expert)
    )


def _layer_bytes(model: Model, sparse: bool, tokens: float, T: int, itemsize: int, tensor: int):
    """Bytes of one layer's activations for `tokens` tokens in rows of T: all, results of matmuls but experts', input.

    Per token: residual stream and norms 4 D; q, k, v as projected, then normed and rotated, and attention's output,
    3 (H + K) h; in short rows scores (float32) and probabilities, H T each; SwiGLU's gate, up and product 3 F, k times
    with experts, whose rows are also copied in and out, 2 k D.
    """
    D, h, H, K = (
        model.hidden_size,
        model.head_dim,
        model.num_attention_heads,
        model.num_key_value_heads,
    )
    k = model.num_experts_per_tok if sparse else 0
    F = k * model.moe_intermediate_size if sparse else model.intermediate_size
    scores = (4 + itemsize) * H * T if T <= SHORT else 0
    everything = (
        itemsize * (4 * D + 2 * k * D + (3 * (H + K) * h + 3 * F) / tensor) + scores / tensor
    )
    results = itemsize * (3 * D + ((H + 2 * K) * h + (0 if sparse else 2 * F)) / tensor)
    return tokens * everything, tokens * results, tokens * itemsize * D


def describe(cfg: Config, vocab_size: int) -> str:
    """The dry run's text: resolved configuration, sizes, costs, warnings. `vocab_size` is the tokenizer's."""
    V = cfg.model.vocab_size or vocab_size
    P, G = cfg.rollout.prompts_per_step, cfg.rollout.group_size
    S, C = cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens
    count, cost, space = parameter_count(cfg.model, V), flops(cfg, V), memory(cfg, V)
    per_rollout = cfg.train.mini_batches * cfg.train.epochs
    notes = warnings(cfg)
    blocks = {
        "parameters": {
            "total": _si(count.total),
            "active per token": _si(count.active),
            "embedding and head": f"{_si(count.embedding)}  (vocabulary {V})",
        },
        "one RL step, at most": {
            "prompts": f"{P} x {S} = {_si(P * S)} tokens",
            "completions": f"{P} x {G} x {C} = {_si(P * G * C)} tokens",
            "optimiser steps": f"{per_rollout} on {P * G // cfg.train.mini_batches} sequences each",
            "rollout": _si(cost.rollout, "FLOP"),
            "scoring": _si(cost.scoring, "FLOP"),
            "update": _si(cost.update, "FLOP"),
            "together": _si(cost.total, "FLOP"),
            **({} if cfg.train.routing_replay == "none" else {"experts to replay": _experts(cfg)}),
        },
        f"memory on one device, estimated ({_mesh(cfg)})": {
            **{
                field.name.replace("_", " "): _gib(getattr(space, field.name))
                for field in dataclasses.fields(space)
            },
            "during rollout": _gib(space.rollout),
            "during update": _gib(space.update),
        },
        "the whole run": {
            "RL steps": str(cfg.train.steps),
            "optimiser steps": f"{cfg.train.steps * per_rollout}  (and {cfg.cold_start.steps} of cold start)",
            "completions": f"{_si(cfg.train.steps * P * G)}, at most {_si(cfg.train.steps * P * G * C)} tokens",
            "FLOP": _si(cfg.train.steps * cost.total, "FLOP"),
        },
    }
    text = [dump(cfg).rstrip()]
    for title, lines in blocks.items():
        text += ["", f"# {title}", *(f"#   {name:<20} {value}" for name, value in lines.items())]
    text += ["", f"# warnings: {len(notes) or 'none'}", *(f"#   {note}" for note in notes)]
    return "\n".join(text) + "\n"


def _experts(cfg: Config) -> str:
    per_token, layers, k = (
        routing_bytes(cfg.model),
        sum(cfg.model.sparse_layers),
        cfg.model.num_experts_per_tok,
    )
    tokens = (
        cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    ) * cfg.rollout.prompts_per_step
    total = tokens * cfg.rollout.group_size * per_token
    ids = f"{layers} layers x {k} ids of {per_token // (layers * k)} B"
    return f"{per_token} B per token ({ids}), {_gib(total)}, on the {cfg.train.routing_on}"


def _mesh(cfg: Config) -> str:
    sizes = [f"{axis} {size}" for axis, size in dataclasses.asdict(cfg.mesh).items() if size > 1]
    axes = " x ".join(sizes) or "one device"
    return f"{axes}, data: all that are left, counted as 1" if cfg.mesh.data == 0 else axes


def _si(number: float, unit: str = "") -> str:
    """1234567 -> "1.23 M"."""
    for scale, prefix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G" if unit else "B"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if number >= scale:
            return f"{number / scale:.3g} {prefix}{unit}"
    return f"{number:g} {unit}".rstrip()


def _gib(number: float) -> str:
    return f"{number / GiB:.3f} GiB"
