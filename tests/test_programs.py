"""Programs that one command compiled are there for the next."""

import os

import jax
import jax.numpy as jnp
import pytest

from train import programs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache of this test, of programs that compile at once as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = "jax_persistent_cache_min_compile_time_secs"
    before, given = jax.config.values[name], jax.config.jax_compilation_cache_dir
    jax.config.update(name, 0.0)
    programs._use(None)  # the session's own
    yield tmp_path / "ibsgl_jax" / "programs"
    jax.config.update(name, before)
    programs._use(given)


def something(x):
    return jnp.sin(x) * 3.0


def compile_something():
    return jax.jit(something).lower(jnp.ones(7)).compile()


def kept_programs(folder):
    """Of it alone: whether jnp's own small ones are compiled here, too, depends."""
    return sorted(folder.glob("jit_something-*-cache"))


@pytest.mark.slow
def test_a_program_is_compiled_once(folder):
    with programs.kept():
        first = compile_something()(jnp.ones(7))
    kept = kept_programs(folder)
    assert kept and jax.config.jax_compilation_cache_dir is None
    jax.clear_caches()
    before = len(programs._saved)
    with programs.kept():
        again = compile_something()(jnp.ones(7))
    assert len(programs._saved) > before
    assert kept_programs(folder) == kept
    assert (first == again).all()
    compile_something()
    assert kept_programs(folder) == kept


@pytest.mark.slow
def test_a_damaged_program_is_compiled_again(folder, recwarn):
    with programs.kept():
        first = compile_something()(jnp.ones(7))
    for path in folder.glob("*-cache"):
        path.write_bytes(b"damaged")
    jax.clear_caches()
    with programs.kept():
        assert (compile_something()(jnp.ones(7)) == first).all()
    assert not [w for w in recwarn if "cache" in str(w.message)]


@pytest.mark.slow
def test_a_cache_that_cannot_be_is_done_without(tmp_path, monkeypatch, folder, recwarn):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.clear_caches()
    with programs.kept():
        assert compile_something()(jnp.zeros(7)).sum() == 0.0
    assert not [w for w in recwarn if "cache" in str(w.message)]


def test_a_folder_that_jax_was_given_is_left(folder, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    try:
        with programs.kept():
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert not folder.exists()


def test_the_oldest_go_when_there_are_too_many(folder, monkeypatch):
    folder.mkdir(parents=True)
    for age in range(4):
        path = folder / f"{age}-cache"
        path.write_bytes(bytes(10))
        os.utime(path, (1e9 - age, 1e9 - age))
    (folder / "other").write_bytes(bytes(100))
    monkeypatch.setattr(programs, "MOST_BYTES", 25)
    with programs.kept():
        pass
    assert sorted(path.name for path in folder.iterdir()) == [
        "0-cache",
        "1-cache",
        "other",
    ]
