"""Reading HLO text: a small module written by hand in the TPU compiler's manner, and programs compiled for CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.plan.collectives import Collective
from sapo_jax.plan.costs import Costs, program_costs
from sapo_jax.plan.hbm_traffic import hbm_bytes
from sapo_jax.plan.hlo import Computation, Shape, parse, parse_instruction, shapes
from sapo_jax.plan.instruction_flops import kernel_flops, kernel_name, matmul_flops
from sapo_jax.plan.loops import OpenLoop
from sapo_jax.plan.report import largest_buffers

# A loop of 7 around: a fusion with a matmul, one collective written in two links of a chain, a gradient's
# reduce-scatter as the emitter writes it, a kernel whose metadata stands on lines of its own, and a conditional.
MODULE = r"""HloModule jit_f, is_scheduled=true

FileNames
1 "/somewhere/sapo_jax/models/moe.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=20 end_line=20 column=8 end_column=8}

StackFrames
5 {file_location_id=1 parent_frame_id=1}


%fused_matmul (p0: bf16[7,8,16], p1: s32[], p2: bf16[16,4]) -> bf16[8,4] {
  %p0 = bf16[7,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[16,4]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %x = bf16[8,16]{1,0} bitcast(%slice)
  %gather.1 = bf16[16,4]{1,0} all-gather(%p2), channel_id=9, replica_groups={{0,1},{2,3}}, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %conv = bf16[8,4]{1,0} convolution(%x, %p2), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (p: f32[32]) -> f32[8] {
  %p = f32[32]{0} parameter(0)
  %all = f32[32]{0} all-reduce(%p), channel_id=3, replica_groups=mesh['a'=4] {'a'}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = f32[8]{0} dynamic-slice(%all, %zero), dynamic_slice_sizes={8}
}

%dear (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %e = f32[8]{0} exponential(%p), backend_config={"window_config":{"estimated_cycles":"5000"}}
}

%cheap (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%body (arg: (s32[], bf16[7,8,16])) -> (s32[], bf16[7,8,16]) {
  %arg = (s32[]{:T(128)}, bf16[7,8,16]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %xs = bf16[7,8,16]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %w = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %fusion.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} fusion(%xs, %i, %w), kind=kOutput, calls=%fused_matmul, metadata={op_name="jit(f)/dot_general" stack_frame_id=5}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %gather.2 = bf16[16,4]{1,0:S(1)} all-gather(%w), channel_id=9, replica_groups={{0,1},{2,3}}, dimensions={0}, frontend_attributes={chain_id="1"}
  %gradient = f32[32]{0} custom-call(), custom_call_target="AllocateBuffer"
  %scattered = f32[8]{0} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/grad" stack_frame_id=5}
  %splash_mha_fwd_residuals.3 = bf16[2,256,128]{2,1,0} custom-call(%w), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1,1]{2,1,0}, bf16[2,256,128]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 128, \"block_kv\": 128}"
}}, metadata={op_name="jit(f)/splash" stack_frame_id=5}
  %which = pred[] constant(true)
  %chosen = f32[8]{0} conditional(%which, %scattered, %scattered), true_computation=%dear, false_computation=%cheap
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %copied = s32[] copy(%next)
  ROOT %result = (s32[], bf16[7,8,16]) tuple(%copied, %xs)
}

%condition (arg: (s32[], bf16[7,8,16])) -> pred[] {
  %arg = (s32[], bf16[7,8,16]) parameter(0)
  %n = s32[] constant(7)
  %i = s32[] get-tuple-element(%arg), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[7,8,16]) -> (s32[], bf16[7,8,16]) {
  %x = bf16[7,8,16]{2,1,0} parameter(0)
  %from = s32[] constant(0)
  %start = (s32[], bf16[7,8,16]) tuple(%from, %x)
  ROOT %loop = (s32[], bf16[7,8,16]) while(%start), condition=%condition, body=%body
}
"""


@pytest.fixture(scope="module")
def module():
    return parse(MODULE)


def test_shapes_and_memory_spaces():
    assert shapes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, s32[], pred[4])") == (
        Shape("bf16", (2, 3), 1), Shape("s32", ()), Shape("pred", (4,))
    )  # fmt: skip
    assert [s.bytes for s in shapes("bf16[2,3], s32[], token[]")] == [12, 4, 0]


def test_costs_of_the_loop(module):
    costs = program_costs(module)
    assert costs.open_loops == 0
    assert costs.cycles == 7 * (100 + 5000)  # of the conditional the dear branch
    assert costs.matmul_flops == 7 * 2 * 8 * 4 * 16
    assert costs.kernels == {
        "splash_mha_fwd_residuals": 7 * 2 * 2 * (2 * 256 * 128) * (256 + 128) / 2
    }
    source = "sapo_jax/models/moe.py:20 (dot_general)"
    assert costs.collectives == {
        Collective("all-gather", "{{0,1},{2,3}}", 128, source): 7,  # two links of one chain
        Collective(
            "reduce-scatter", "mesh['a'=4] {'a'}", 128, "sapo_jax/models/moe.py:20 (grad)"
        ): 7,
    }


def test_of_conditional_kernels_the_cheaper_branch_counts():
    """A kernel moves from the loop's body into the dear branch: then the other one is what runs."""
    kernel = MODULE[MODULE.index("  %splash_mha") : MODULE.index("  %which")]
    moved = MODULE.replace(kernel, "").replace(
        "  ROOT %e = f32[8]", kernel.replace("(%w)", "(%p)") + "  ROOT %e = f32[8]"
    )
    costs = program_costs(parse(moved))
    assert costs.cycles == 7 * 100 and not costs.kernels


def test_hbm_bytes_of_a_fusion_count_slices_and_only_hbm(module):
    """The fused matmul reads one slice of a stacked array; the rest is on chip, and scalars are too small to count."""
    body = module.computations["body"]
    assert hbm_bytes(module, body, body.instructions["fusion.1"]) == 8 * 16 * 2
    assert hbm_bytes(module, body, body.instructions["scattered"]) == 32 * 4 + 8 * 4


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # a quarter of an array in HBM is brought on chip, beside other work
        (
            "((bf16[8,4,16]{2,1,0}), bf16[8,1,16]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%x)",
            8 * 16 * 2,
        ),
        ("(f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%x)", 8 * 4),  # onto the chip
        ("(f32[8]{0}, f32[8]{0}, u32[]{:S(2)}) copy-start(%x)", 2 * 8 * 4),  # from HBM to HBM
        ("(bf16[8]{0}, bf16[32]{0}) all-gather-start(%x)", (8 + 32) * 2),
    ],
)
def test_hbm_bytes_of_asynchronous_copies(line, expected):
    module = parse(
        f"HloModule m\n\nENTRY %main () -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n  ROOT %s = {line}\n}}\n"
    )
    computation = module.computations[module.entry]
    assert hbm_bytes(module, computation, computation.instructions["s"]) == expected


def test_a_loop_that_ends_on_data_runs_as_often_as_told():
    open_ended = parse(MODULE.replace("s32[] constant(7)", "s32[] negate(%i)"))
    assert program_costs(open_ended, open_trips=3).cycles == 3 * 5100
    assert program_costs(open_ended).open_loops == 1


def test_loops_that_end_on_data_are_told_one_by_one():
    open_ended = parse(MODULE.replace("s32[] constant(7)", "s32[] negate(%i)"))
    three = OpenLoop("three times", trips=3)
    two = OpenLoop("twice", trips=2)
    assert program_costs(open_ended, open_trips=(three,)).cycles == 3 * 5100
    with pytest.raises(ValueError, match="1 loops that end on data, expected 2"):
        program_costs(open_ended, open_trips=(three, two))


@pytest.mark.parametrize(("start", "step", "trips"), [(0, 2, 4), (3, 1, 4), (1, 3, 2)])
def test_trip_counts_from_start_and_step(start, step, trips):
    text = MODULE.replace("%from = s32[] constant(0)", f"%from = s32[] constant({start})")
    text = text.replace("%one = s32[] constant(1)", f"%one = s32[] constant({step})")
    assert program_costs(parse(text)).cycles == 5100 * trips


def test_largest_buffers_name_their_source(module):
    assert largest_buffers(module, 1) == [
        "0.000 GiB  bf16[2, 256, 128]  sapo_jax/models/moe.py:20 (splash)"
    ]


def test_not_a_module():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("ERROR: out of memory")


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "flops"),
    [
        ("f32[5,6]", "f32[6,7]", "f32[5,7]", "dim_labels=bf_io->bf", 2 * 5 * 6 * 7),
        ("f32[5,6]", "f32[7,6]", "f32[5,7]", "dim_labels=bf_oi->bf", 2 * 5 * 6 * 7),
        # x BD, w DHh -> BHh: the heads go in as a window over padding, and each meets one place of it
        ("f32[10,6,1]", "f32[6,8,4]", "f32[10,8,4]", "window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
         2 * 10 * 6 * 8 * 4),
        ("f32[10,8,6]", "f32[8,6,3]", "f32[10,3,1]", "window={size=8}, dim_labels=b0f_0io->bf0", 2 * 10 * 8 * 6 * 3),
    ],
)  # fmt: skip
def test_matmuls_as_convolutions(lhs, rhs, out, attributes, flops):
    lines = (
        f"%a = {lhs} parameter(0)",
        f"%b = {rhs} parameter(1)",
        f"%c = {out} convolution(%a, %b), {attributes}",
    )
    computation = Computation("c", {i.name: i for i in map(parse_instruction, lines)})
    assert matmul_flops(computation, computation.instructions["c"]) == flops


def test_grouped_matmul_counts_the_tiles_it_visits():
    """1024 rows in tiles of 256 and 3 groups: up to 4 + 3 - 1 tiles are computed."""
    line = (
        '%gmm.4 = bf16[1024,64] custom-call(), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[], '
        "s32[5]{0}, s32[6]{0}, s32[6]{0}, bf16[1024,32]{1,0}, bf16[3,32,64]{2,1,0}}, "
        'backend_config={"cost_estimate":{"flops":"4194304"}}'
    )
    gmm = parse_instruction(line)
    assert kernel_name(gmm) == "gmm"
    assert kernel_flops(gmm) == 2 * 1024 * 32 * 64 * 6 / 4


def test_costs_add_up():
    one = Costs(cycles=1, matmul_flops=2, hbm_bytes=3)
    one.kernels["k"] += 5
    total = Costs()
    total.add(one, 3)
    assert (total.cycles, total.matmul_flops, total.hbm_bytes, total.flops) == (3, 6, 9, 6 + 15)


def test_programs_compiled_for_cpu_count_loops():
    """5 x (32 x 64 x 64) multiplications and additions in a scan, with their gradient three times that."""

    def f(w, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0].sum()

    w, x = np.zeros((5, 64, 64), np.float32), np.zeros((32, 64), np.float32)
    once = 5 * 2 * 32 * 64 * 64
    for function, flops in ((f, once), (jax.grad(f, argnums=(0, 1)), 3 * once)):
        costs = program_costs(parse(jax.jit(function).lower(w, x).compile().as_text()))
        assert costs.matmul_flops == flops and costs.open_loops == 0
        assert costs.hbm_bytes > w.nbytes


def test_flops_of_paged_attention():
    """16 rows and key heads of 2 queries, 48 pages of 64 columns: 192 columns each."""
    line = (
        '%paged_attention.2 = (f32[16,2,1,128]) custom-call(), custom_call_target="tpu_custom_call", '
        "operand_layout_constraints={s32[16]{0}, s32[48]{0}, s32[1]{0}, s32[1]{0}, f32[16,2,1,128]{3,2,1,0}, "
        "bf16[1,48,64,128]{3,2,1,0}, bf16[1,48,64,128]{3,2,1,0}}, frontend_attributes={kernel_metadata={}}"
    )
    kernel = parse_instruction(line)
    assert kernel_name(kernel) == "paged_attention"
    assert kernel_flops(kernel) == 2 * 2 * 16 * 2 * 128 * 192
    module = parse(f"HloModule m\n\nENTRY %main () -> f32[16,2,1,128] {{\n  ROOT {line}\n}}\n")
    whole = program_costs(module)
    half = program_costs(module, live_cache_fraction=0.5)
    assert half.flops == whole.flops / 2 > 0 and half.hbm_bytes == whole.hbm_bytes / 2 > 0
