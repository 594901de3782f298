"""The notebooks: kept without outputs, and run."""

import importlib.util
import json
import warnings

import pytest

from tests.layers import ROOT
from tests.pages import (
    NOTEBOOKS,
    name,
    promotion_as_users_have_it,  # noqa: F401
)


class TestNotebooks:
    @pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
    def test_outputs_are_stripped(self, notebook):
        for cell in json.loads(notebook.read_text())["cells"]:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None

    @pytest.mark.slow
    def test_explain_a_folder(self, tmp_path):
        shape = run_notebook("explain_a_folder.ipynb", "list(maps['ib'].shape)")
        assert shape == [4, 224, 224]

    @pytest.mark.slow
    def test_photos_in_a_notebook(self):
        notebook = execute_notebook(
            "photos_in_a_notebook.ipynb",
            "[table['accuracy'].to_dict(), sorted(set(frame['phase'])), "
            "[[float(m.max()), list(m.shape)] for m in maps.values()], "
            "[name for name in config.trackers]]",
        )
        value = json.loads(notebook.cells[-1].outputs[-1]["text"])
        accuracy, phases, maps, trackers = value
        assert set(accuracy) == {"plain", "guided"}
        assert min(accuracy.values()) > 0.7  # of two kinds, on 32 pictures
        assert phases == ["guided", "plain"]
        for most, shape in maps:
            assert most > 0 and shape == [1, 64, 64]
        there = (n for n in ("wandb", "mlflow") if importlib.util.find_spec(n))
        assert trackers == list(there)
        outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
        # The curve, the run's picture, and the explained photo are all seen.
        assert sum("image/png" in o.get("data", {}) for o in outputs) == 3

    @pytest.mark.slow
    def test_one_loss_in_your_loop(self):
        results = run_notebook(
            "one_loss_in_your_loop.ipynb",
            "{k: [float(x) for x in v] for k, v in results.items()}",
        )
        accuracy = {phase: values[0] for phase, values in results.items()}
        share = {phase: values[1] for phase, values in results.items()}
        assert accuracy["plain"] > 0.6  # ten classes
        assert accuracy["guided"] > accuracy["control"] - 0.03  # of 497 images
        assert share["guided"] > share["control"] + 0.01
        # The loss without its precautions, from random weights.
        assert accuracy["scratch, unsafe"] < 0.2 < accuracy["scratch, plain"]

    @pytest.fixture(autouse=True)
    def no_warnings_of_jupyter(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


def run_notebook(file, expression):
    """Runs a notebook in a kernel of this environment; the value of an expression."""
    return json.loads(execute_notebook(file, expression).cells[-1].outputs[-1]["text"])


def execute_notebook(file, expression):
    """A notebook with its outputs, and a last cell that prints an expression."""
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    notebook = nbformat.read(ROOT / "docs" / file, as_version=4)
    notebook.cells.append(
        nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({expression}))")
    )
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
    ).execute()
    return notebook
