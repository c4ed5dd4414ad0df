"""The whole configuration schema: frozen dataclasses, their units and their defaults.

The section `objective` is in `objective.py`. Every key has a default, but for those of sections
that are off by default; a YAML file or a `key.path=value` override changes it. pydantic validates
types and ranges strictly (`validate.py`); what must hold between several keys is checked in
`checks.py`. Letters such as P, G and E are those of the shape legend in `types.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import pydantic

from sapo_jax.config.objective import SAPO, Objective
from sapo_jax.config.section import (
    LARGEST,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
    Seconds,
    config_section,
)

# ---------------------------------------------------------------- model


@config_section
class Yarn:
    """YaRN context extension (Peng et al., arXiv 2309.00071), keys as in the Hugging Face
    `rope_scaling`."""

    factor: Annotated[float, pydantic.Field(ge=1)] = 4.0
    original_max_position_embeddings: Count = 32768
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None  # None: 0.1 ln(factor) + 1


@config_section
class Model:
    """A Qwen3 decoder; the keys are those of the Hugging Face config.

    `preset` names a published shape (`presets.PRESETS`), `path` a Hugging Face model directory
    whose weights RL starts from. `load` writes the shape of either out, under the keys that are
    given beside it. `path` also sets data.tokenizer and data.chat_template to the model's own.
    """

    preset: str | None = None
    # A directory with config.json, safetensors and tokenizer.json; None: random weights.
    path: str | None = None
    vocab_size: CountOrZero = 0  # V; 0: the tokenizer's size
    hidden_size: Count = 128  # D
    num_hidden_layers: Count = 4  # L
    num_attention_heads: Count = 4  # H
    num_key_value_heads: Count = 2  # K
    head_dim: Count = 32  # h
    intermediate_size: Count = 384  # F of a dense MLP
    qk_norm: bool = True  # False for Llama-shaped models
    attention_bias: bool = False  # biases of the projections q, k, v and o
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 1e6
    rope_scaling: Yarn | None = None
    tie_word_embeddings: bool = True
    max_position_embeddings: Count = 40960  # longest sequence, tokens
    initializer_range: Positive = 0.02
    num_experts: CountOrZero = 0  # E; 0: every MLP is dense
    num_experts_per_tok: Count = 2  # k
    # With experts: every so many-th layer has them, the others have a dense MLP.
    decoder_sparse_step: Count = 1
    # Layers (counted from 0) that have a dense MLP all the same.
    mlp_only_layers: tuple[CountOrZero, ...] = ()
    moe_intermediate_size: Count = 96  # F of one expert
    norm_topk_prob: bool = True  # the gate weights of the k chosen experts sum to 1
    # Coefficient of the load-balancing loss (Switch, arXiv 2101.03961 Eq. 4).
    router_aux_loss_coef: NonNegative = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # parameters are always float32
    # What the backward pass computes again instead of keeping it. none: nothing. dots: all but
    # attention and matmuls (those of experts are computed again). attention: all but attention.
    # full: all. On CPU the hidden units of experts always are, and so is attention of rows of 32
    # tokens and fewer.
    remat: Literal["none", "dots", "attention", "full"] = "dots"
    # Largest slice of the vocabulary whose logits the scorer holds at once.
    vocab_chunk: Count = 16384

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it has experts."""
        has_experts = []
        for layer in range(self.num_hidden_layers):
            on_step = (layer + 1) % self.decoder_sparse_step == 0
            kept_dense = layer in self.mlp_only_layers
            has_experts.append(self.num_experts > 0 and on_step and not kept_dense)
        return tuple(has_experts)


# ---------------------------------------------------------------- data, rewards


@config_section
class ReasoningGymTask:
    """Problems from a reasoning-gym generator.

    The names are an allow-list: scorers that execute the answer are refused.
    """

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    name: str = "chain_sum"
    weight: Positive = 1.0  # share of each batch, relative to the other tasks' weights
    size: Count = 10000  # training problems generated (distinct ones are kept)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # the generator's own options


@config_section
class FileTask:
    """Problems from the rows of a JSONL, JSON or Parquet file, or of a directory of such files.

    A row has `prompt` (text, or messages) and `answer`; optional are `verifier`, `metadata` and
    `tools`. The usual other names of the first two are detected (data/layouts.py).
    """

    kind: Literal["file"] = "file"
    path: str = ""
    name: str = ""  # "": the file's name without its extension
    weight: Positive = 1.0
    verifier: str = "math"  # for rows that name none
    held_out_path: str | None = None  # None: `data.held_out` rows are set aside from `path`
    # Which columns of `path` they are, e.g. {prompt: problem, answer: reward_model.ground_truth};
    # a dot leads into an object. Those that are not named here are detected.
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    held_out_columns: dict[str, str] | None = None  # those of held_out_path; None: `columns`


Task = Annotated[ReasoningGymTask | FileTask, pydantic.Field(discriminator="kind")]


@config_section
class Data:
    """The tasks, and how their problems become prompts."""

    tokenizer: str = "byte"  # "byte", or the path of a tokenizer.json
    # "auto" (the one beside the tokenizer), "chatml", "plain" (the question alone), or the path of
    # a Jinja template.
    chat_template: str = "chatml"
    # Variables of the template, e.g. {enable_thinking: false}.
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    system_prompt: str = ""  # for problems that bring no system message of their own
    tasks: tuple[Task, ...] = ()
    held_out: Count = 256  # problems kept for evaluation over all tasks, never trained on
    max_prompt_tokens: Count = 256  # longer prompts are dropped and counted
    # Of problem generation and of the train / held-out split; it is NOT the training seed.
    seed: CountOrZero = 0


@config_section
class Overlong:
    """DAPO's soft punishment of long completions (arXiv 2503.14476, Eq. 13), added to the reward.

    It is 0 up to max_tokens - cache_tokens, falls from there to -1 at max_tokens, and stays there.
    """

    cache_tokens: Count  # L_cache
    max_tokens: CountOrZero = 0  # L_max; 0: rollout.max_new_tokens


@config_section
class Rewards:
    """How completions are verified."""

    # Which part of the completion is the answer.
    # auto: the last \boxed{...} after the thinking, or all that follows the thinking.
    extract: Literal["auto", "all", "final", "answer_tag", "boxed", "last_number"] = "auto"
    # Added when the completion has the form that `extract` asks for.
    format_reward: NonNegative = 0.0
    workers: Count = 2  # verifier processes
    deadline: Seconds = 5.0  # seconds per completion; then its worker is killed
    batch_deadline: Seconds = 600.0  # seconds per batch; what has not begun by then is masked
    # What a completion is at whose deadline there was no verdict: wrong (reward 0), or masked.
    on_timeout: Literal["wrong", "mask"] = "wrong"
    memory_mb: Count = 2048  # address space of a worker
    max_chars: Count = 20000  # longer answers (not completions) are unparsable
    plugins: tuple[str, ...] = ()  # modules to import that register verifiers
    # Of the trainer, on top of what verifiers give; no penalty in evaluations.
    overlong: Overlong | None = None

    def of_pool(self) -> dict[str, Any]:
        """The settings of the verifier pool: all but what the trainer adds to its rewards."""
        settings = dataclasses.asdict(self)
        del settings["overlong"]
        return settings


# ---------------------------------------------------------------- rollout, loss


@config_section
class DynamicSampling:
    """DAPO's dynamic sampling (arXiv 2503.14476): groups without a preference are drawn again.

    A group is kept where some of its completions are correct and some are not. Each round samples
    prompts_per_step further prompts, until so many groups are kept.
    """

    max_rounds: Count = 10  # of a step, the first one included
    # What happens where they have not given enough groups. train: the step trains on those there
    # are; places that are left over weigh nothing. stop: the run stops, as in verl.
    short_batch: Literal["train", "stop"] = "train"


@config_section
class Rollout:
    """How completions are sampled."""

    prompts_per_step: Count = 32  # P
    group_size: Annotated[int, pydantic.Field(ge=2, le=LARGEST)] = 8  # G, completions of one prompt
    max_new_tokens: Count = 64
    # Completions that are written at a time, also in evaluations; one that is done leaves its slot
    # to the next (0: all at once). Fewer take less memory, and less time where the longest are
    # much longer than the others.
    slots: CountOrZero = 0
    # Prompts whose completions are sampled together, 0: all P. With fewer, the sampler's memory
    # does not grow with P; the completions are the same.
    prompts_at_once: CountOrZero = 0
    dynamic_sampling: DynamicSampling | None = None
    temperature: Positive = 1.0  # also divides the logits in the scorer
    top_k: CountOrZero = 0  # 0: off
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0

    @property
    def prompts_in_flight(self) -> int:
        """Prompts whose completions are sampled together."""
        return self.prompts_at_once or self.prompts_per_step


@config_section
class Advantage:
    """A = R - mean of the group.

    `group` also divides by std(ddof) + eps; `leave_one_out` leaves R out of its own mean.
    """

    kind: Literal["group", "mean_only", "leave_one_out"] = "group"
    ddof: Annotated[int, pydantic.Field(ge=0, le=1)] = 0
    eps: NonNegative = 1e-6


@config_section
class SequenceMask:
    """Which sequences are left out of the surrogate: those with A < 0 that have become unlikely.

    A sequence is masked where A < 0 and the mean over its tokens of log(pi / pi_sampler) is less
    than -below. Its terms are 0 and the denominators stay (arXiv 2512.02556, Eq. 9). `below` has
    no default, because values from 1e-4 to 0.5 are in use (see configs/README.md).
    """

    below: Positive  # nats per token


@config_section
class Loss:
    """How tokens are weighted, and what is added to the surrogate.

    sequence_mean: 1 / (n_sequences * |y_i|) (GRPO, GSPO, SAPO Eq. 5); token_mean: 1 / n_tokens
    (DAPO); constant: 1 / (n_sequences * max_new_tokens) (Dr. GRPO, arXiv 2503.20783).
    """

    normalization: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    # Estimator of KL(policy || its start of the RL stage).
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    kl_coef: NonNegative = 0.0
    # Weight exp(old logp - sampler logp) of a token, against the mismatch of sampler and scorer.
    correction: Literal["none", "truncated", "masked"] = "none"
    correction_cap: Annotated[float, pydantic.Field(gt=1)] = 2.0
    # Truncated completions leave the loss (DAPO's overlong filtering); their rewards still count in
    # their groups' mean and std.
    overlong_filter: bool = False
    sequence_mask: SequenceMask | None = None  # with any objective; the KL penalty is not masked


# ---------------------------------------------------------------- optimiser, loop


@config_section
class Optimizer:
    """AdamW with decoupled weight decay on matrices (not on norms)."""

    learning_rate: Positive = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: CountOrZero = 0  # optimiser steps
    # Of the learning rate, at the end of a linear or cosine schedule.
    final_fraction: Fraction = 0.1
    b1: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.9
    b2: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0


@config_section
class ColdStart:
    """Supervised fine-tuning on the tasks' own answers, before RL. steps = 0: none."""

    steps: CountOrZero = 0
    batch_size: Count = 64  # sequences per optimiser step
    response: str = "{answer}"  # what the model learns to say; the end token is appended
    # A JSONL or Parquet file whose `answer`s are whole responses; None: the tasks' problems.
    demonstrations: str | None = None
    # The folder of a run whose cold start is taken instead of training one (`sapo-jax sft` makes
    # it). Model, data and all keys of this section must be the same there.
    taken_from: str | None = None
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)


@config_section
class Train:
    """The RL stage."""

    steps: Count = 100  # RL steps: one rollout batch each
    mini_batches: Count = 4  # N, optimiser steps per pass over a rollout batch (paper: 4; VL: 2)
    # Per forward and backward so many sequences of full length, or as many tokens in longer rows;
    # or so many rows of row_tokens. 0: the whole mini-batch.
    micro_batch: CountOrZero = 0
    row_tokens: CountOrZero = 0  # length of a packed row; 0: the cheapest, chosen for each rollout
    epochs: Count = 1  # passes over a rollout batch
    # Where the denominator of the ratio comes from.
    old_logp: Literal["scorer", "sampler"] = "scorer"
    # The experts that updates replay. r2: those of the scoring pass (arXiv 2507.18071); r3: those
    # of the sampler (arXiv 2510.11370).
    routing_replay: Literal["none", "r2", "r3"] = "none"
    # Where their ids wait: on the host, sent with each mini-batch; or on the device, sent once a
    # rollout.
    routing_on: Literal["host", "device"] = "host"
    # r3: RL steps between scoring passes without replay, made to log the difference; 0: never.
    live_mismatch_every: CountOrZero = 0
    # For experiments. sigma of noise in the denominator of the ratio, of sd
    # sigma * (1 - pi_old), whose factor on r has mean 1 (see training/old_logp_noise.py).
    old_logp_noise: NonNegative = 0.0
    seed: CountOrZero = 0
    max_nonfinite: Count = 5  # stop after so many non-finite updates in a row
    # Stop after so many steps in a row in whose rollouts the verifier has failed on a larger share
    # of the completions.
    max_error_steps: Count = 3
    max_error_fraction: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.5
    # Say so after so many steps in a row without a group that has a preference; 0: never.
    no_signal_steps: CountOrZero = 10
    log_samples: CountOrZero = 8  # completions of each step that go to samples.jsonl
    print_samples_every: CountOrZero = 20  # RL steps between prints of a few completions; 0: never


@config_section
class Diagnostics:
    """Evidence for SAPO's assumptions A1 and A2, and for what hard clips would throw away
    (`diagnostics.jsonl`)."""

    # RL steps between rows of diagnostics.jsonl; 0: none, and none of its scalars in metrics.
    every: CountOrZero = 1


@config_section
class Metrics:
    """Where the rows of `metrics.jsonl` go beside that file."""

    # tensorboard: RUN/tb. wandb and trackio: their libraries (`pip install sapo-jax[wandb]`).
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    project: str = "sapo_jax"  # what wandb and trackio file the run under
    # False: wandb and trackio write to this machine alone. True: they may send, as their own
    # settings say (`wandb login`, WANDB_MODE; TRACKIO_SPACE_ID).
    online: bool = False


@config_section
class Evaluate:
    """Sampling the held-out problems."""

    every: CountOrZero = 0  # RL steps between evaluations; 0: only before and after RL
    samples: Count = 8  # k of avg@k and pass@k
    temperature: NonNegative = 1.0  # 0: greedy
    batch_prompts: Count = 64  # held-out prompts sampled at once


@config_section
class Mesh:
    """Devices along each mesh axis; their product is the number of devices used.

    data = 0: all devices that the other axes leave.
    """

    data: CountOrZero = 0
    fsdp: Count = 1
    expert: Count = 1
    context: Count = 1
    tensor: Count = 1

    @property
    def devices_without_data(self) -> int:
        """The product of all axes but `data`."""
        return self.fsdp * self.expert * self.context * self.tensor

    @property
    def sequence_shards(self) -> int:
        """Over how many devices sequences are split; data = 0 counts as 1."""
        return max(1, self.data) * self.fsdp * self.expert

    def data_on(self, devices: int) -> int:
        """`data`; where it is 0, what the other axes leave of so many devices, at least 1."""
        return self.data or max(1, devices // self.devices_without_data)


@config_section
class Checkpoint:
    """When the state is saved, and which checkpoints are kept."""

    every: Count = 20  # steps
    keep_last: Count = 2  # two stay in any case: the newest, and the one before it
    keep_every: CountOrZero = 0  # steps; 0: only the last ones are kept
    # What happens to a policy that is finite but ruined (configs/README.md): the run stops and does
    # not save it; or it is saved like any other, for experiments on how policies collapse.
    on_ruin: Literal["stop", "save"] = "stop"


@config_section
class Config:
    """A whole run."""

    name: str = "run"
    run_dir: str = "runs/{name}"  # {name} and {seed} are filled in
    # Where compiled programs are kept for the next process. "auto": JAX_COMPILATION_CACHE_DIR, or
    # a folder of the user, $XDG_CACHE_HOME/sapo_jax/programs. "none": nowhere. Or a path, which may
    # be in a bucket.
    compilation_cache: Annotated[str, pydantic.Field(min_length=1)] = "auto"
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    rewards: Rewards = dataclasses.field(default_factory=Rewards)
    rollout: Rollout = dataclasses.field(default_factory=Rollout)
    objective: Objective = dataclasses.field(default_factory=SAPO)
    advantage: Advantage = dataclasses.field(default_factory=Advantage)
    loss: Loss = dataclasses.field(default_factory=Loss)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    cold_start: ColdStart = dataclasses.field(default_factory=ColdStart)
    train: Train = dataclasses.field(default_factory=Train)
    diagnostics: Diagnostics = dataclasses.field(default_factory=Diagnostics)
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
