"""What becomes of the measures: summaries, paired intervals, sanity, controls."""

import jax
import numpy as np

from configs import quickstart
from ibsgl_jax import attribution, metrics
from train.measure import statistics
from train.measure.catalogue import NUM_BINS
from train.measure.controls import control_of
from train.measure.methods import sanity_verdict


class TestSummaries:
    def test_mean_interval_and_count_by_hand(self):
        summary = statistics.summarize(
            {"drop": np.array([0.0, 1.0, np.nan, 1.0])}, intervals=True
        )
        assert summary["drop"]["n"] == 3
        assert summary["drop"]["undefined"] == 1
        np.testing.assert_allclose(summary["drop"]["mean"], 2 / 3)
        assert 0 <= summary["drop"]["low"] < 2 / 3 < summary["drop"]["high"] <= 1

    def test_best_iou_is_at_one_threshold_for_all(self):
        curve = np.zeros((2, 20))
        curve[0, 3], curve[1, 7], curve[:, 5] = 0.9, 0.9, 0.6
        summary = statistics.summarize({"iou_curve": curve})
        np.testing.assert_allclose(summary["iou_best"]["mean"], 0.6)
        assert summary["iou_best"]["threshold"] == 5 / 20

    def test_boxes_are_measured(self, evaluated):
        _, _, results, _ = evaluated
        measures = results["phases"]["plain"]
        assert 0 <= measures["corloc"]["mean"] <= measures["max_box_acc"]["mean"] + 1e-6
        assert measures["max_box_acc"]["threshold"] in [k / 20 for k in range(20)]

    def test_masses_are_compared_over_the_whole_split(self):
        """Not the mean of ratios; an L^p of no mass counts, an unknown box does not.

        Nor does an image without a runner-up, whose every class is a label.
        """
        values = {
            "mass_c": np.float32([1, 3, 4, 2, 6, 7]),
            "mass_p": np.float32([1, 1, 0, 8, 0, np.nan]),
            "p_box_share": np.float32([0.5, 1.0, 0.0, np.nan, np.nan, np.nan]),
        }
        summary = statistics.summarize(values, intervals=True)
        entry = summary["mass_ratio"]
        assert (entry["mean"], entry["n"], entry["undefined"]) == (10 / 16, 5, 1)
        assert entry["low"] < 10 / 16 < entry["high"]
        entry = summary["p_on_object"]
        assert (entry["mean"], entry["n"], entry["undefined"]) == (1.5 / 8, 3, 3)
        none = statistics.summarize({k: v[:0] for k, v in values.items()})
        assert np.isnan(none["mass_ratio"]["mean"]) and none["mass_ratio"]["n"] == 0

    def test_calibration_error_is_the_library_s(self):
        logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) * 2
        labels = np.arange(50) % 4
        expected = metrics.calibration_error(
            metrics.calibration_bins(logits, labels, num_bins=NUM_BINS)
        )
        actual = statistics.calibration_error(
            np.asarray(jax.nn.softmax(logits).max(axis=1)),
            np.asarray(metrics.accuracy(logits, labels)),
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_differences_are_paired(self):
        # Large spread between images, the same gain on each: a narrow interval.
        reference = {"box_share": np.linspace(0, 1, 20)}
        values = {"box_share": reference["box_share"] + 0.25}
        row = statistics.differences(values, reference)["box_share"]
        np.testing.assert_allclose([row["low"], row["high"]], 0.25, atol=1e-12)

    def test_summaries_are_those_of_the_examples(self, evaluated):
        _, _, results, per_example = evaluated
        for row in results["methods"]:
            values = per_example[f"{row['method']}/{row['model']}/drop"]
            assert len(values) == 5
            np.testing.assert_allclose(
                row["measures"]["drop"]["mean"], values.mean(), rtol=1e-6
            )


class TestSanityCheck:
    def test_maps_that_do_not_change_fail(self):
        maps = np.random.default_rng(0).random((4, 8, 8)).astype(np.float32)
        constant = np.ones_like(maps)
        for before, after in (
            (maps, maps),
            (maps, 3.0 * maps),
            (constant, 2.0 * constant),  # no rank correlation, and yet unchanged
            (0.0 * maps, 0.0 * maps),
        ):
            change = statistics.map_change(before, after)
            np.testing.assert_allclose(change, 1.0, rtol=1e-5)
            assert not sanity_verdict(change)["passed"]

    def test_unrelated_maps_pass(self):
        maps = np.random.default_rng(0).random((8, 16, 16)).astype(np.float32)
        assert sanity_verdict(statistics.map_change(maps[:4], maps[4:]))["passed"]

    def test_nothing_finite_does_not_pass(self):
        change = statistics.map_change(np.full((2, 4, 4), np.nan), np.ones((2, 4, 4)))
        assert not sanity_verdict(change)["passed"]

    def test_the_random_method_fails(self, evaluated):
        _, _, results, _ = evaluated
        assert results["sanity"].keys() == attribution.METHODS.keys()
        assert results["sanity"]["random"]["mean"] == 1.0
        assert not results["sanity"]["random"]["passed"]
        # Between two untrained networks even the gradient is alike, but it moves.
        assert results["sanity"]["gradient"]["mean"] < 0.95


class TestControls:
    def test_same_start_data_and_epochs(self):
        config = quickstart.get_config()
        phases = ("plain", "scratch", "control", "guided")
        with config.unlocked():
            config.scratch = config.guided.copy_and_resolve_references()
            config.scratch.init = "random"
            config.scratch.num_epochs = 10.0
        assert control_of(config, "guided", phases) == "control"
        assert control_of(config, "control", phases) is None
        # As plain from random weights, but for longer.
        assert control_of(config, "scratch", phases) is None
        config.scratch.num_epochs = config.plain.num_epochs
        assert control_of(config, "scratch", phases) == "plain"
        config.scratch.dataset = "photo_digits/other"
        assert control_of(config, "scratch", phases) is None
