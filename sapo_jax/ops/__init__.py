"""Operations that decide how fast the model is: attention, mixtures of experts, matrix products.

Each kind of operation has a file without a suffix (`attention`, `expert_parallel`, `matmul`), which
chooses the backend. A backend has a file of its own: `_xla` is plain XLA, which is exact and serves
every processor but TPUs, and `_tpu` uses Pallas kernels. All tuning for CPUs lives
in this folder, so that the model code says only what is computed. The switch between backends is
`sapo_jax.distributed.sharding.on_tpu`.
"""
