"""Maps that could teach: measured on a network, kept, and put in a table."""

import json

import numpy as np
import pytest

from tests import tiny_run
from train import teachers
from train.errors import UserError
from train.measure import splits
from train.run import saved_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, photo_digits_dir):
    workdir = tmp_path_factory.mktemp("teachers") / "tiny"
    config = tiny_run.make_config(photo_digits_dir, phases=("plain",))
    tiny_run.save_untrained(config, workdir)
    return saved_run.Run(workdir)


def open_source(run, limit=20):
    return saved_run.open_split(run, "validation", limit)


class TestMeasure:
    def test_saliency_is_that_of_the_evaluation(self, run):
        """20 images in batches of 16: the padding of the second does not count."""
        source = open_source(run)
        found = teachers.measure(run, "plain", source, None)
        values = splits.measure_split(
            run.config, run.model, run.states["plain"].variables, source
        )
        for name in ("box_share", "pointing"):
            np.testing.assert_allclose(found[name], np.nanmean(values[name]), rtol=1e-5)
        assert -1.0 <= found["class_correlation"] <= 1.0

    def test_too_few_steps_do_not_see_the_class(self, run):
        """IBA's start lets everything through: the map after one step is the same."""
        source = open_source(run)
        early = teachers.measure(run, "plain", source, teachers.Teacher("", 1, 1))
        assert early["class_correlation"] > 0.9999

    def test_inner_layer_is_tapped(self, run):
        source = open_source(run, limit=4)
        layer = teachers.measure(
            run, "plain", source, teachers.Teacher("layer1_0", 2, 1)
        )
        last = teachers.measure(run, "plain", source, teachers.Teacher("", 2, 1))
        assert 0.0 < layer["box_share"] < 1.0
        # The only block's output is the features: another path to the same layer.
        np.testing.assert_allclose(layer["box_share"], last["box_share"], rtol=0.05)

    def test_without_boxes_maps_are_judged_by_what_they_explain(self, run):
        examples = open_source(run, limit=4)
        source = [
            {k: v for k, v in examples[i].items() if k not in ("bbox", "mask")}
            for i in range(4)
        ]
        found = teachers.measure(run, "plain", source, None)
        assert found.keys() == {"matched_drop", "deletion_mean", "class_correlation"}
        values = splits.measure_split(
            run.config, run.model, run.states["plain"].variables, source
        )
        expected = values["matched_drop"].mean()
        np.testing.assert_allclose(found["matched_drop"], expected, rtol=1e-4)
        assert 0.0 < found["deletion_mean"] < 1.0


class TestCommand:
    def test_measures_once(self, run, capsys, monkeypatch):
        arguments = ["--workdir", str(run.workdir), "--limit", "4"]
        arguments += ["--steps", "1", "2", "--samples", "1"]
        assert teachers.main(arguments) == 0
        out = capsys.readouterr().out
        assert "| L^c |" in out and "| last, 2 steps, 1 sample |" in out
        known = json.loads((run.workdir / "teachers_validation.json").read_text())
        assert len(known) == 7  # L^c, two numbers of steps, two betas, two blurs
        monkeypatch.setattr(teachers, "measure", None)
        assert teachers.main(arguments) == 0
        assert capsys.readouterr().out == out


@pytest.mark.parametrize("text", ['{"a": ', "[1]", '{"a": 1}'])
def test_damaged_results_are_one_line(text, tmp_path):
    (tmp_path / "teachers_test.json").write_text(text)
    with pytest.raises(UserError, match="is damaged .*; delete it"):
        teachers.read(tmp_path, "test")


def test_table_has_means_and_margins():
    columns = ("box_share", "pointing", "class_correlation")
    rows = {"a": [dict.fromkeys(columns, v) for v in (0.4, 0.6)]}
    line = teachers.table(rows).splitlines()[-1]
    # Student's t with one degree of freedom: 12.706 * .1414 / sqrt(2).
    assert line == "| a | " + " | ".join(["0.500 ± 1.271"] * 3) + " |"
