"""progress.py: lines while verification takes long."""

from sapo_jax.io.progress import VerificationNotice
from sapo_jax.rewards.pool import Progress


def test_a_slow_batch_says_how_far_it_is_ever_more_rarely(capsys):
    seconds = iter([0.0, 1.0, 2.5, 3.0, 7.0, 8.0])
    notice = VerificationNotice(clock=lambda: next(seconds))
    for done in (100, 512, 600, 700, 1024):
        notice(Progress(done, total=1024, timed_out=done // 200))
    assert capsys.readouterr().err.splitlines() == [
        "verifying: 512 of 1,024 done, 2 timed out, 2 s",
        "verifying: 700 of 1,024 done, 3 timed out, 7 s",
    ]


def test_a_quick_batch_says_nothing(capsys):
    notice = VerificationNotice(clock=lambda: 0.0)
    for done in range(10):
        notice(Progress(done, total=10, timed_out=0))
    assert capsys.readouterr().err == ""
