"""SAPO and the methods it is judged against, in JAX/Flax: RL post-training of language models.

    import sapo_jax as sj

    sj.objectives.sapo(log_ratio_BT, adv_BT, mask_BT, sj.config.SAPO())
    sj.load_config("configs/quickstart.yaml", "train.steps=10")
    sj.open_policy("runs/quickstart").sample(["Calculate 3 + 4."])
    sj.read_metrics("runs/quickstart")        # columns that pandas.DataFrame takes
    sj.read_diagnostics("runs/quickstart")

The names are in `__init__.pyi`. They are imported when they are first used (`lazy_loader`, after
SPEC 1 of Scientific Python), so that what needs no JAX starts without it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
