"""The pages of the documentation and a newcomer's settings, for the tests of them."""

import jax
import pytest

from tests.layers import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "RESULTS.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "NOTES.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))


@pytest.fixture(scope="module", autouse=True)
def promotion_as_users_have_it():
    """Snippets and notebooks run without conftest's flags: a newcomer has set none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_NUMPY_RANK_PROMOTION")  # for the notebooks' kernels
        patch.delenv("JAX_NUMPY_DTYPE_PROMOTION")
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            yield


def name(path):
    return str(path.relative_to(ROOT))
