"""Operations that decide how fast the model is: attention, mixtures of experts, matrix products.

There is one kind of operation for each file without a suffix (`attention`, `expert_parallel`,
`matmul`); it chooses the backend. A file for each backend follows: `_xla` in plain XLA, which is
exact and serves every processor but TPUs, and `_tpu` with Pallas kernels. All tuning for CPUs lives
in this folder, so that the model code says only what is computed. The switch between backends is
`sapo_jax.distributed.sharding.on_tpu`.
"""
