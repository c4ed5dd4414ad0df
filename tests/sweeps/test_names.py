"""Names of runs and of values, for any keys and texts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_jax.sweeps.file import short_names, slug

# The same examples in every run, and no deadline on a busy machine.
STEADY = settings(derandomize=True, deadline=None)


@STEADY
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, max_size=6))
def test_slugs_are_file_names_that_tell_texts_apart(texts):
    names = [slug(text) for text in texts]
    assert len(set(names)) == len(texts)
    for name in names:
        assert 0 < len(name) <= 40 and "/" not in name


@STEADY
@given(
    keys=st.lists(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join), unique=True
    )
)
def test_short_names_are_distinct_ends(keys):
    names = short_names(keys)
    assert len(set(names.values())) == len(keys)
    for key, name in names.items():
        assert key == name or key.endswith(f".{name}")
