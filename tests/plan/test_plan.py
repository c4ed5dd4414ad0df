"""`sapo-jax plan` itself. Where the TPU compiler (libtpu) is not installed, what needs it is skipped."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from sapo_jax.cli import main
from sapo_jax.config import Config, Data, Mesh, Model, ReasoningGymTask, Rollout, Train
from sapo_jax.errors import PlanError
from sapo_jax.plan import plan, rank_meshes
from sapo_jax.plan.chips import parse_topology, tpu_devices
from sapo_jax.plan.compile import Compiled, compile_cached, largest_refused
from sapo_jax.plan.hlo import parse
from sapo_jax.plan.planner import TPU_ENV, topology_mesh
from sapo_jax.plan.programs import Programs
from sapo_jax.plan.tables import show, show_ranking
from sapo_jax.rollout.sampler import _sample

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install -c .ci/constraints.txt -e '.[plan]'",
)
CFG = Config(
    model=Model(
        vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        intermediate_size=256, compute_dtype="bfloat16", remat="attention",
    ),
    data=Data(max_prompt_tokens=64, tasks=(ReasoningGymTask(),)),
    rollout=Rollout(prompts_per_step=8, group_size=4, max_new_tokens=64),
    train=Train(mini_batches=2, row_tokens=128),
    mesh=Mesh(data=1, fsdp=4),
)  # fmt: skip


@pytest.fixture
def tpu(monkeypatch, tmp_path):
    """libtpu's environment, and a cache of the test's own."""
    for key, value in TPU_ENV.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    for on in (False, True):  # jax's cache cannot read programs for devices that are not here
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()
        if not on:
            yield


@needs_libtpu
def test_plan_of_a_tiny_model(tpu):
    """Four chips: all is there that a plan promises, and a second one is read from the cache."""
    found = plan(CFG, "v5e:2x2", ["update", "prefill"])
    assert (found["devices"], found["mesh"]["fsdp"]) == (4, 4)
    update = found["functions"]["update"]
    assert update["fits"] and 0 < update["peak_fraction"] < 0.1 and update["missing_gib"] == 0
    assert (
        1.0 < update["flops_ratio"] < 2.0
    )  # attention of T x T instead of T x T / 2 in blocks of 128
    assert {"splash_mha_fwd_segmented_residuals", "splash_mha_dkv_segmented_no_residuals"} == set(
        update["flops_kernels"]
    )
    assert {row["axis"] for row in update["collectives"]} == {"fsdp"}
    assert {"all-gather", "reduce-scatter"} <= {row["kind"] for row in update["collectives"]}
    assert update["bound"] in ("compute", "hbm", "interconnect") and 0 < update["mfu"] < 1
    assert json.loads(json.dumps(found)) == found
    again = plan(CFG, "v5e:2x2", ["update", "prefill"])
    assert again == found  # compile times too


@needs_libtpu
def test_slots_that_do_not_divide_over_the_topology(tpu):
    """mesh.data: 0 is open until the topology says how many devices there are."""
    cfg = dataclasses.replace(
        CFG, mesh=Mesh(data=0), rollout=dataclasses.replace(CFG.rollout, slots=6)
    )
    with pytest.raises(
        PlanError,
        match="6 completions that are written at a time cannot be split over .* = 4 devices",
    ):
        plan(cfg, "v5e:2x2", ["decode"])


@needs_libtpu
def test_experts_over_an_axis(tpu):
    """Two shards of experts: tokens are gathered over `expert` and their sums scattered back; grouped matmuls run."""
    model = dataclasses.replace(
        CFG.model, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128
    )
    cfg = dataclasses.replace(CFG, model=model, mesh=Mesh(data=1, fsdp=2, expert=2))
    score = plan(cfg, "v5e:2x2", ["score"])["functions"]["score"]
    assert score["fits"] and score["flops_kernels"]["gmm"] > 0
    exchanged = {(row["kind"], row["axis"]) for row in score["collectives"]}
    assert ("all-gather", "expert") in exchanged and ("reduce-scatter", "expert") in exchanged


@needs_libtpu
@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 2}])
def test_decoding_moves_tokens_to_the_weights(tpu, mesh):
    """In a step nothing larger than the step's logits passes between chips: no weight does, the cache stays."""
    sparse = (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}
        if "expert" in mesh
        else {}
    )
    model = dataclasses.replace(CFG.model, intermediate_size=1024, **sparse)
    decode = plan(
        dataclasses.replace(CFG, model=model, mesh=Mesh(data=1, **mesh)), "v5e:2x2", ["decode"]
    )
    decode = decode["functions"]["decode"]
    steps = CFG.rollout.max_new_tokens
    each_step = [
        row["bytes"] / row["times"] for row in decode["collectives"] if row["times"] >= steps
    ]
    B = 32
    logits = 4 * B * model.vocab_size  # bytes
    weight = 2 * model.hidden_size * 1024  # bytes of one MLP or expert matrix
    assert decode["fits"] and each_step and max(each_step) <= logits < weight


@needs_libtpu
def test_decoding_in_slots_is_priced_step_by_step(tpu):
    """32 completions of 64 tokens in 16 slots: the FLOPs of two times 64 steps, and those of columns without keys."""
    cfg = dataclasses.replace(CFG, rollout=dataclasses.replace(CFG.rollout, slots=16))
    decode = plan(cfg, "v5e:2x2", ["decode"])["functions"]["decode"]
    assert decode["fits"] and decode["open_loops"] == 1 + 2 * 4 and 1 < decode["flops_ratio"] < 1.2


@needs_libtpu
@pytest.mark.parametrize("slots", [0, 16])
def test_decoding_reads_pages_and_copies_no_cache(tpu, slots):
    """Heads of 128 in bfloat16: a step runs the kernel of paged attention in each layer, and no copy or other fusion of
    the cache than the one that writes a page, of keys neither. Also where completions wait for slots."""
    rollout = dataclasses.replace(CFG.rollout, slots=slots)
    cfg = dataclasses.replace(
        CFG, model=dataclasses.replace(CFG.model, head_dim=128), rollout=rollout
    )
    programs = Programs(cfg, topology_mesh(cfg, tpu_devices(parse_topology("v5e:2x2"))))
    sampler = programs.sampler
    with jax.set_mesh(programs.mesh):
        traced = _sample.trace(sampler, programs.params, *programs.program("prefill").arguments[1:])
    module = parse(traced.lower(lowering_platforms=("tpu",)).compile().as_text())
    rows, widths = (16 // 4, [320]) if slots else (32 // 4, [192])
    steps = [
        c
        for c in module.computations.values()
        if any("paged_attention" in name for name in c.instructions)
    ]
    free = ("parameter", "tuple", "get-tuple-element", "bitcast", "dynamic-update-slice")
    found_widths = set()
    for step in steps:
        kernels = [i for i in step.instructions.values() if i.name.startswith("paged_attention")]
        cache = max(
            shape.elements for shape in step.operand_shapes(kernels[0])[-1]
        )  # a device's values of a layer
        found_widths.add(cache // (rows * 2 * 128))
        whole = [
            i
            for i in step.instructions.values()
            if i.shapes and max(s.elements for s in i.shapes) >= cache
        ]
        moved = [i.name for i in whole if i.op not in free and not _writes_a_part(module, i)]
        assert len(kernels) == CFG.model.num_hidden_layers and len(whole) >= 6 and not moved
    assert sorted(found_widths) == widths and len(steps) == len(widths)


def _writes_a_part(module, i) -> bool:
    return (
        i.op == "fusion"
        and module.computations[i.called["calls"]].root.op == "dynamic-update-slice"
    )


@needs_libtpu
def test_what_does_not_fit_is_a_verdict(tpu, capsys):
    """12 billion parameters with their moments on four chips of 16 GB."""
    model = dataclasses.replace(
        CFG.model, hidden_size=8192, num_hidden_layers=32, intermediate_size=16384
    )
    result = plan(dataclasses.replace(CFG, model=model), "v5e:2x2", ["update"])
    update = result["functions"]["update"]
    assert update["fits"] is False and update["peak_fraction"] > 1 and update["missing_gib"] > 1
    assert "RESOURCE_EXHAUSTED" in update["verdict"]
    assert any("['gate']" in line or "['up']" in line for line in update["largest_buffers"])
    show(result, Console(width=200))
    printed = capsys.readouterr().out
    assert "update does not fit: RESOURCE_EXHAUSTED" in printed
    assert update["largest_buffers"][0] in printed


@needs_libtpu
@pytest.mark.slow
def test_sweep_ranks_the_meshes(tpu, capsys):
    """Every mesh of four chips that the config allows comes once, by the estimated seconds."""
    found = rank_meshes(CFG, "v5e:2x2", ["prefill"])
    meshes = sorted(tuple(one["mesh"].values()) for one in found)
    assert meshes == [
        (1, 2, 1, 1, 2),
        (1, 4, 1, 1, 1),
        (2, 1, 1, 1, 2),
        (2, 2, 1, 1, 1),
        (4, 1, 1, 1, 1),
    ]
    seconds = [one["functions"]["prefill"]["seconds"]["estimate"] for one in found]
    assert seconds == sorted(seconds)
    show_ranking(found, Console())
    assert "tensor 2" in capsys.readouterr().out


@needs_libtpu
def test_a_topology_that_libtpu_does_not_have(tpu):
    with pytest.raises(PlanError, match="topology v5e:3x7"):
        tpu_devices(parse_topology("v5e:3x7"))


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        PlanError, match=r"libtpu \(640 MB\), is not installed: pip install .*\[plan\]"
    ):
        tpu_devices(parse_topology("v5e:2x2"))


def test_a_mesh_that_does_not_cover_the_topology():
    cfg = dataclasses.replace(CFG, mesh=Mesh(data=1, fsdp=3))
    with pytest.raises(
        PlanError, match="mesh.data=1, mesh.fsdp=3, .* makes 3 devices, the topology has 4"
    ):
        topology_mesh(cfg, [None] * 4)


def test_functions_that_do_not_exist():
    with pytest.raises(
        PlanError, match="no function train; there are update, score, prefill, decode"
    ):
        plan(CFG, "v5e:2x2", ["train"])


def test_the_command_says_what_is_wrong(capsys):
    quickstart = str(Path(__file__).parents[2] / "configs/quickstart.yaml")
    assert main(["plan", quickstart, "--topology", "v9:1"]) == 1
    assert "unknown topology 'v9:1'" in capsys.readouterr().err


REFUSAL = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.

Total hbm usage >= 20.75G:
    reserved        258.00M

Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(update)/while/body/dot_general" source_file="/x/sapo_jax/models/layers.py" source_line=45
     Shape: f32[32,8192,8192]{2,1,0:T(8,128)}
     Unpadded size: 8.00G
     XLA label: fusion.1
     Allocation type: HLO temp

  2. Size: 2.00G
     Shape: f32[8192,65536]{1,0}
     Allocation type: HLO temp
"""


def test_reading_a_refusal():
    refused = Compiled(False, 1.0, refusal=REFUSAL)
    assert refused.needed == int(20.5 * 2**30)
    short = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (60.90G) exceeds"
    assert Compiled(False, 1.0, refusal=f"{short} available HBM (15.75G).").needed == int(
        60.9 * 2**30
    )
    assert largest_refused(REFUSAL) == [
        "8.00G  f32[32,8192,8192]{2,1,0:T(8,128)}  layers.py:45",
        "2.00G  f32[8192,65536]{1,0}  ?",
    ]


def test_compiles_are_kept_by_text(tmp_path):
    lowered = jax.jit(lambda x: x + 1).lower(jax.numpy.ones(3))
    first = compile_cached(lowered, "here", tmp_path)
    assert first.fits and "ENTRY" in first.hlo and first.peak > 0
    assert compile_cached(lowered, "here", tmp_path) == first and len(list(tmp_path.iterdir())) == 1
    compile_cached(lowered, "there", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
