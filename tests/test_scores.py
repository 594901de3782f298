"""The scores of a run's phases: equal to the split's means, and measured once."""

import json
import shutil

import numpy as np
import pytest

from tests import tiny_run
from train import scores
from train.errors import UserError
from train.measure import scores_file, splits, statistics, temperature
from train.run import saved_run

LIMITS = {"measures": None, "deletion": 5, "perturbed": 0, "methods": 5}


def finish(workdir, *phases):
    """What training leaves when a phase is at its end."""
    (workdir / "models").mkdir(exist_ok=True)
    for phase in phases:
        (workdir / "models" / f"{phase}.npz").touch()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, photo_digits_dir):
    workdir = tmp_path_factory.mktemp("scores") / "tiny"
    config = tiny_run.make_config(photo_digits_dir, phases=("plain", "guided"))
    tiny_run.save_untrained(config, workdir)
    finish(workdir, "plain")
    return workdir


@pytest.fixture(scope="module")
def record(workdir):
    record, notes = scores.measure_run(
        workdir, "validation", phases=None, limits=LIMITS, progress=False
    )
    assert notes == ["phase guided is not trained to its end"]
    return record


class TestMeasureRun:
    def test_means_are_those_of_the_split(self, workdir, record):
        run = saved_run.Run(workdir, phases=["plain"])
        source = saved_run.open_split(run, "validation")
        values = splits.measure_split(
            run.config, run.model, run.states["plain"].variables, source
        )
        entry = record["phases"]["plain"]["measures"]
        values |= temperature.measure_split(
            run.config,
            run.model,
            run.states["plain"].variables,
            source,
            validation=source,
        )
        summary = statistics.summarize(values)
        assert entry["num_images"] == len(source) == 24
        assert entry["means"].keys() == summary.keys()
        assert {"nll", "calibration_error", "iou_best", "p_box_share"} <= summary.keys()
        assert {"temperature", "nll_scaled", "calibration_scaled"} <= summary.keys()
        for key, value in entry["means"].items():
            np.testing.assert_allclose(value, summary[key]["mean"], 1e-5, err_msg=key)
        # The temperature is validation's, so it can only lower this split's NLL.
        assert entry["means"]["nll_scaled"] <= entry["means"]["nll"] + 1e-6
        assert record["seed"] == run.config.seed

    def test_deletion_by_the_mean_colour_of_the_first_images(self, record):
        entry = record["phases"]["plain"]["deletion"]
        assert entry["num_images"] == 5
        assert entry["means"].keys() == {"deletion_mean", "insertion_mean"}
        assert (
            scores_file.means(record["phases"]["plain"]).keys() > entry["means"].keys()
        )

    def test_what_is_there_is_not_measured_again(self, workdir, record, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("the run was opened")

        def again(phases=None, limits=LIMITS, methods=()):
            return scores.measure_run(
                workdir,
                "validation",
                phases=phases,
                limits=limits,
                methods=methods,
                progress=False,
            )[0]

        with monkeypatch.context() as patch:
            patch.setattr(saved_run, "Run", refuse)
            assert again() == record
            with pytest.raises(AssertionError, match="opened"):
                again(limits={**LIMITS, "deletion": 6})
        # What is new is added to what is there.
        finish(workdir, "guided")
        more = again(methods=["hirescam"], limits={**LIMITS, "deletion": 0})
        assert list(more["phases"]) == ["plain", "guided"]
        plain = dict(more["phases"]["plain"])
        method = plain.pop("methods")["hirescam"]
        assert plain == record["phases"]["plain"]
        assert method["num_images"] == 5
        # Our own map, but on five images.
        assert {"drop", "box_share", "pointing"} <= method["means"].keys()
        first = again(limits={"measures": 5}, phases=["plain"])["phases"]["plain"]
        for key, value in method["means"].items():
            np.testing.assert_allclose(
                value, first["measures"]["means"][key], 1e-4, err_msg=key
            )


class TestToMeasure:
    def test_lists_what_the_record_lacks(self):
        part = {"limit": None, "means": {"nll": 1.0}}
        record = {"phases": {"a": {"measures": part, "methods": {"ib": part}}}}
        limits = {"measures": None, "deletion": 0, "methods": None}
        missing = scores_file.to_measure(record, ["a", "b"], limits, ["ib", "grad_cam"])
        assert missing == [
            ("a", "methods", "grad_cam"),
            ("b", "measures", None),
            ("b", "methods", "ib"),
            ("b", "methods", "grad_cam"),
        ]


def test_of_a_measure_in_two_parts_the_one_of_more_images_is_shown():
    def part(number, **means):
        return {"limit": number, "num_images": number, "means": means}

    few, many = part(8, deletion_mean=0.6, road=0.1), part(64, deletion_mean=0.5)
    phase = {"deletion": many, "perturbed": few}
    for found in (phase, dict(reversed(phase.items()))):
        assert scores_file.means(found) == {"deletion_mean": 0.5, "road": 0.1}
    assert scores_file.measured(phase)["deletion_mean"] == (0.5, 64)


class TestSummarize:
    def test_by_hand(self):
        nan = np.nan
        summary = scores.means_of(
            {
                "accuracy": np.array([1.0, 0.0, 1.0]),
                "confidence": np.array([0.9, 0.9, 0.5]),
                "box_share": np.array([0.2, nan, 0.4]),
                "pointing": np.array([nan, nan, nan]),
                "iou_curve": np.array([[0.1, 0.4], [nan, nan], [0.6, 0.5]]),
                "predicted": np.array([1.0, 2.0, 3.0]),
            }
        )
        means = summary["means"]
        assert means.keys() == {
            *("accuracy", "box_share", "pointing", "iou_best", "calibration_error")
        }
        np.testing.assert_allclose(means["box_share"], 0.3)
        np.testing.assert_allclose(means["iou_best"], 0.45)  # not .35
        assert means["pointing"] is None
        # Bins of .9: |1 - 1.8|; of .5: |1 - .5|; over three images.
        np.testing.assert_allclose(means["calibration_error"], 1.3 / 3)
        assert summary["undefined"] == {"box_share": 1, "pointing": 3, "iou_best": 1}


class TestMain:
    def test_prints_the_table_of_the_record(self, workdir, record, capsys):
        arguments = ["--workdir", str(workdir), "--split", "validation"]
        arguments += ["--num-perturbed", "0", "--phases", "plain", "--limit", "3"]
        assert scores.main([*arguments, "--no-progress"]) == 0
        assert "| plain |" in capsys.readouterr().out
        found = json.loads((workdir / "scores_validation.json").read_text())
        assert found["phases"]["plain"]["measures"]["num_images"] == 3

    def test_a_phase_without_its_checkpoint_is_left_out(
        self, workdir, record, tmp_path
    ):
        other = shutil.copytree(workdir, tmp_path / "other")
        finish(other, "guided")
        shutil.rmtree(other / "checkpoints" / "guided")
        (other / "scores_test.json").unlink(missing_ok=True)
        found, notes = scores.measure_run(
            other, "test", phases=None, limits={"measures": 3}, progress=False
        )
        assert list(found["phases"]) == ["plain"]
        assert notes == ["phase guided has no checkpoint yet and is left out"]

    @pytest.mark.parametrize(
        "text", ['{"phases": {"plain"', "[]", '{"phases": {"a": {"measures": {}}}}']
    )
    def test_damaged_scores_are_one_line(self, text, tmp_path):
        path = scores_file.path(tmp_path, "test")
        path.write_text(text)
        with pytest.raises(UserError, match=f"{path} is damaged; delete it"):
            scores_file.read(tmp_path, "test")

    def test_mistakes_are_one_line(self, workdir, tmp_path, capsys):
        for arguments, words in (
            (["--workdir", str(tmp_path), "--split", "test"], "holds no run"),
            (["--workdir", str(workdir), "--split", "dusk", "--limit", "2"], "dusk"),
            (
                ["--workdir", str(workdir), "--split", "test", "--limit", "-1"],
                "--limit: -1",
            ),
            (
                ["--workdir", str(workdir), "--split", "test", "--phases", "x"],
                "no phase 'x'",
            ),
        ):
            assert scores.main(arguments) == 2
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1
