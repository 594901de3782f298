"""The evaluation: ragged batches, paired intervals, the sanity check and bad input."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import quickstart
from ibsgl_jax import attribution, metrics
from tests import tiny_run
from train import devices, evaluate
from train.errors import ConfigError
from train.measure import splits, statistics
from train.measure.batch import measure, measure_maps, method_maps
from train.measure.catalogue import MEASURES, NUM_BINS
from train.measure.controls import control_of
from train.measure.methods import sanity_verdict
from train.measure.parts import Parts
from train.run import saved_run

STATS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
# The same numbers from other batches and devices round differently.
CLOSE = dict(rtol=2e-4, atol=2e-5)


def without(source, *names):
    return [
        {key: value for key, value in source[i].items() if key not in names}
        for i in range(len(source))
    ]


class OneClass(nn.Module):
    """A model that knows one class only."""

    def setup(self):
        self.conv, self.dense = nn.Conv(4, (3, 3), strides=8), nn.Dense(1)

    def features(self, images, train=False):
        return nn.relu(self.conv(images))

    def head(self, features, train=False):
        return self.dense(features.mean(axis=(1, 2)))

    def __call__(self, images, train=False):
        return self.head(self.features(images, train), train)


class TestMeasureSplit:
    def test_ragged_batches_on_eight_devices_equal_single_images(self, evaluated):
        run, source, _, per_example = evaluated  # 11 images in batches of 16
        variables = run.states["guided"].variables
        single = jax.jit(
            functools.partial(
                measure,
                model=run.model,
                image_stats=STATS,
                matched_area=run.config.matched_area,
            )
        )
        for index in (0, 10):
            batch = {k: np.asarray(v)[None] for k, v in source[index].items()}
            for key, value in single(variables, batch).items():
                np.testing.assert_allclose(
                    per_example[f"guided/{key}"][index],
                    value[0],
                    err_msg=key,
                    **CLOSE,
                )

    def test_another_batch_size_gives_the_same_in_the_same_order(self, evaluated):
        run, source, _, per_example = evaluated
        config = run.config.copy_and_resolve_references()
        config.batch_size = 8  # 11 = 8 + 3
        values = splits.measure_split(
            config, run.model, run.states["plain"].variables, source
        )
        assert values["drop"].shape == (11,)
        for key, value in values.items():
            np.testing.assert_allclose(
                value, per_example[f"plain/{key}"], err_msg=key, **CLOSE
            )

    def test_random_methods_do_not_see_the_batch(self, evaluated):
        run, source, _, _ = evaluated
        config = run.config.copy_and_resolve_references()
        maps, variables = [], run.states["plain"].variables
        for config.batch_size in (8, 16):
            step = devices.compiled(
                method_maps, config, run.model, num_carried=2, method="random"
            )
            maps.append(
                splits.map_split(
                    config,
                    source,
                    lambda batch, step=step: {"maps": step(variables, None, batch)},
                )["maps"]
            )
        np.testing.assert_allclose(*maps, rtol=1e-6)
        assert not np.allclose(maps[0][0], maps[0][1])  # every image has its own

    def test_perturbation_starts_at_the_probability(self, evaluated):
        _, _, _, per_example = evaluated
        np.testing.assert_allclose(
            per_example["plain/deletion_curve"][:, 0],
            per_example["plain/probability"][:5],
            **CLOSE,
        )


class TestMissingPieces:
    def test_split_without_boxes_leaves_localisation_out(self, evaluated):
        run, source, _, per_example = evaluated
        values = splits.measure_split(
            run.config,
            run.model,
            run.states["plain"].variables,
            without(source, "bbox", "mask"),
        )
        summary = statistics.summarize(values, intervals=True)
        groups = {MEASURES[key].group for key in summary}
        assert groups == {"Prediction", "Faithfulness", "Two maps"}
        np.testing.assert_allclose(values["drop"], per_example["plain/drop"], **CLOSE)

    def test_masks_stand_in_for_boxes(self, evaluated):
        run, source, _, per_example = evaluated
        values = splits.measure_split(
            run.config,
            run.model,
            run.states["plain"].variables,
            without(source, "bbox"),
        )
        # The object is smaller than its box.
        assert (values["box_share"] <= per_example["plain/box_share"] + 1e-6).all()
        assert (values["box_share"] < per_example["plain/box_share"] - 1e-3).any()

    def test_one_class_has_no_runner_up(self):
        model = OneClass()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
        batch = {
            "image": np.full((2, 16, 16, 3), 100, np.uint8),
            "label": np.zeros(2, np.int32),
        }
        bound = functools.partial(
            measure, model=model, image_stats=STATS, matched_area=0.2
        )
        values = jax.jit(bound)(variables, batch)
        assert "overlap" not in values and "mass_p" not in values
        np.testing.assert_array_equal(values["probability"], [1.0, 1.0])

    def test_nan_in_a_map_stays_with_its_image(self, evaluated):
        run, source, _, _ = evaluated
        batch = {
            k: np.stack([source[i][k] for i in range(3)]) for k in source[0].keys()
        }
        maps = np.random.default_rng(0).random((3, 48, 48)).astype(np.float32)
        broken = maps.copy()
        broken[1, 5, 5] = np.nan
        fn = jax.jit(
            functools.partial(
                measure_maps,
                run.states["plain"].variables,
                model=run.model,
                image_stats=STATS,
                matched_area=0.2,
            )
        )
        whole = jax.device_get(fn(batch, maps))
        values = jax.device_get(fn(batch, broken))
        for key in values:
            assert np.isnan(values[key][1]).all(), key
            np.testing.assert_array_equal(values[key][[0, 2]], whole[key][[0, 2]])
        summary = statistics.summarize(values, intervals=True)
        assert summary["drop"]["n"] == 2 and summary["drop"]["undefined"] == 1
        assert np.isfinite(summary["drop"]["mean"])

    def test_notes_name_what_is_missing(self, evaluated):
        run, _, results, _ = evaluated
        broken = json.loads(json.dumps(results))
        broken |= {"has_boxes": False, "num_images": 1, "num_classes": 1}
        broken["methods"][0]["undefined_maps"] = 2
        notes = " ".join(evaluate.notes_of(broken, [run], 1))
        for words in ("neither boxes", "one image", "one class", "2 of 5 maps of ib"):
            assert words in notes
        notes = evaluate.notes_of(results, [run], 11)
        control = "guided has no control: no plain phase with the same init, data and"
        assert any(note.startswith(control) for note in notes)
        # Untrained, and below the most frequent class.
        assert all("control" in note or "maps mean nothing" in note for note in notes)
        notes = evaluate.notes_of(results | {"split": "validation"}, [run], 20)
        assert "11 of 20 images, drawn at random" in " ".join(notes)
        assert "temperature is fitted on split validation itself" in " ".join(notes)


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
        """Not the mean of ratios; an L^p of no mass counts, an unknown box does not."""
        values = {
            "mass_c": np.float32([1, 3, 4, 2]),
            "mass_p": np.float32([1, 1, 0, 8]),
            "p_box_share": np.float32([0.5, 1.0, np.nan, np.nan]),
        }
        summary = statistics.summarize(values, intervals=True)
        entry = summary["mass_ratio"]
        assert (entry["mean"], entry["n"], entry["undefined"]) == (1.0, 4, 0)
        assert entry["low"] < 1.0 < entry["high"]
        entry = summary["p_on_object"]
        assert (entry["mean"], entry["n"], entry["undefined"]) == (1.5 / 8, 3, 1)
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


class TestFiles:
    def test_json_holds_every_measure_with_its_definition(self, evaluated):
        run, _, _, per_example = evaluated
        text = (run.workdir / "evaluation.json").read_text()
        results = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
        for phase in ("plain", "guided"):
            measured = results["phases"][phase]
            assert measured.keys() == MEASURES.keys()
            for key, entry in measured.items():
                assert entry["low"] <= entry["mean"] <= entry["high"] or key == (
                    "calibration_error"  # resampling adds to it
                )
        counts = {key: results["phases"]["plain"][key]["n"] for key in MEASURES}
        assert counts["drop"] == 11
        assert counts["road"] == 5
        assert counts["sensitivity_n"] == 3
        assert all(m["definition"] for m in results["measures"].values())
        with np.load(run.workdir / "evaluation.npz") as arrays:
            np.testing.assert_array_equal(
                arrays["plain/drop"], per_example["plain/drop"]
            )

    def test_every_method_stands_on_both_models(self, evaluated):
        _, _, results, _ = evaluated
        rows = {(row["method"], row["model"]) for row in results["methods"]}
        assert rows == {
            (m, p) for m in attribution.METHODS for p in ("plain", "guided")
        }
        ours = [row for row in results["methods"] if row["ours"]]
        assert [(r["method"], r["model"]) for r in ours] == [("hirescam", "guided")]


@pytest.fixture
def small(monkeypatch):
    """The command measures little."""
    options = functools.partial(
        evaluate.Options,
        methods=("hirescam",),
        num_perturbed=0,
        num_sensitivity=0,
        num_method_images=2,
        num_sanity=2,
        num_statistics=16,
        pictures=False,
    )
    monkeypatch.setattr(evaluate, "Options", options)


class TestResume:
    def test_goes_on_with_the_same_numbers(self, evaluated, tmp_path, small):
        run, source, results, per_example = evaluated
        options = evaluate.Options(limit=11, num_perturbed=5)

        def go_on(fail_at=None):
            kept = Parts(tmp_path / "parts", {"run": "tiny"})
            kept.start({})
            made = []

            def get(name, make):
                if name == fail_at:
                    raise KeyboardInterrupt
                return Parts.get(kept, name, lambda: made.append(name) or make())

            kept.get = get
            found = evaluate.evaluate_run(
                run, source, options=options, progress=False, kept=kept
            )
            return made, found

        with pytest.raises(KeyboardInterrupt):
            go_on(fail_at="phase guided perturbed")
        made, (again, values) = go_on()
        assert made == ["phase guided perturbed", "method hirescam"]
        assert again["phases"]["plain"] == {
            key: entry
            for key, entry in results["phases"]["plain"].items()
            if key != "sensitivity_n"
        }
        np.testing.assert_array_equal(values["guided/road"], per_example["guided/road"])

    def test_the_command_takes_the_plan_it_had(self, evaluated, tmp_path, small):
        run, source, _, _ = evaluated
        run = SimpleNamespace(**vars(run) | {"workdir": tmp_path})
        asked = evaluate.Options(limit=11)
        kept, options, seconds = evaluate.start(run, [], source, asked, full=False)
        assert options == asked and kept.plan is None and 0 < seconds < 3600
        known = dataclasses.asdict(options) | {"num_images": 4}
        kept.start({"options": known, "seconds": 7.0})
        kept, options, seconds = evaluate.start(run, [], source, asked, full=False)
        assert options.num_images == 4 and options.methods == ("hirescam",)
        assert seconds == 7.0
        # Another question is another evaluation.
        kept, options, _ = evaluate.start(run, [], source, asked, full=True)
        assert options.num_images is None and kept.plan is None


class TestBar:
    """The time left is the plan's at first, and the passes' own at the end."""

    def left(self, bar, elapsed):
        bar.start_t = bar._time() - elapsed
        found = bar.format_dict
        return (found["total"] - found["n"]) / found["rate"]

    @pytest.fixture
    def bar(self):
        with evaluate.Bar(1000, seconds=100.0, progress=True) as bar:
            yield bar

    def test_compiling_promises_no_hours(self, bar):
        bar.advance(1)
        assert 90 < self.left(bar, elapsed=30.0) < 140

    def test_a_slow_machine_is_believed(self, bar):
        bar.advance(800)
        assert 20 < self.left(bar, elapsed=400.0) < 140

    def test_what_was_there_took_no_time(self, bar):
        bar.advance(500, new=False)
        assert self.left(bar, elapsed=0.0) == pytest.approx(50.0, rel=0.1)
        bar.advance(500)
        assert "100%" in str(bar)


class TestWeak:
    def test_all_weak_phases_are_one_note(self, evaluated):
        run, source, results, _ = evaluated
        phases = {
            name: results["phases"]["plain"] | {"accuracy": {"mean": mean}}
            for name, mean in (("plain", 0.2), ("control", 0.3), ("guided", 0.9))
        }
        weak = results | {"phases": phases, "majority": {"name": "x", "share": 0.3}}
        (note,) = [
            note
            for note in evaluate.notes_of(weak, [run], len(source))
            if "no reasons" in note
        ]
        assert "plain (20.0%), control (30.0%)" in note and "guided" not in note


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


class TestBadInput:
    def test_no_run(self, tmp_path, capsys):
        assert evaluate.main(["--workdir", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "no config.json" in error

    def test_no_checkpoint(self, evaluated, tmp_path):
        run = evaluated[0]
        (tmp_path / "config.json").write_text(run.config.to_json())
        with pytest.raises(ConfigError, match="no checkpoint in .*python -m train"):
            saved_run.load_states(run.config, 10, tmp_path)
        assert not (tmp_path / "checkpoints").exists()

    def test_checkpoint_of_another_model(self, evaluated):
        run = evaluated[0]
        config = run.config.copy_and_resolve_references()
        config.model_options.num_filters = 4
        with pytest.raises(ConfigError, match="is of another model than"):
            saved_run.load_states(config, 10, run.workdir)

    def test_a_phase_without_checkpoint_is_left_out(self, evaluated):
        run = evaluated[0]
        config = run.config.copy_and_resolve_references()
        config.unlock()
        config.phases = ("plain", "control")
        _, loaded, notes = saved_run.load_states(config, 10, run.workdir)
        assert list(loaded) == ["plain"]
        assert notes == ["phase control has no checkpoint yet and is left out"]

    def test_phases_can_be_chosen(self, evaluated):
        run = evaluated[0]
        assert saved_run.choose_phases(run.config, ["guided"]) == ("guided",)
        with pytest.raises(ConfigError, match="no phase 'gided'; it has plain, guided"):
            saved_run.choose_phases(run.config, ["gided"])

    def test_unknown_split_and_empty_split(self, evaluated):
        run = evaluated[0]
        with pytest.raises(ValueError, match="no split 'nonsense'"):
            saved_run.open_split(run, "nonsense")
        with pytest.raises(ConfigError, match="no image"):
            saved_run.open_split(run, limit=0)

    @pytest.mark.slow
    def test_the_command_says_one_line_and_2(self, tmp_path):
        environment = {**os.environ, "XLA_FLAGS": ""}
        done = subprocess.run(
            [sys.executable, "-m", "train.evaluate", "--workdir", str(tmp_path)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

    def test_the_command_compares_runs(self, tmp_path, photo_digits_dir, small, capsys):
        for name in ("one", "other"):
            config = tiny_run.make_config(photo_digits_dir, phases=("plain",))
            tiny_run.save_untrained(config, tmp_path / name)
        arguments = ["--workdir", str(tmp_path / "one"), "--limit", "3"]
        assert evaluate.main([*arguments, "--compare", str(tmp_path / "other")]) == 0
        results = json.loads((tmp_path / "one" / "evaluation.json").read_text())
        assert list(results["phases"]) == ["plain", "other/plain"]
        # The same weights: the same numbers.
        assert results["phases"]["plain"] == results["phases"]["other/plain"]
        assert "other/plain" in (tmp_path / "one" / "report.html").read_text()
        assert not (tmp_path / "one" / "evaluation.parts").exists()
        # A second look at the same run: its own name is taken.
        double = [*arguments, "--compare", *[str(tmp_path / "other")] * 3]
        assert evaluate.main(double) == 2
        assert "compared twice" in capsys.readouterr().err

    def test_runs_that_cannot_be_compared(self, evaluated):
        run = evaluated[0]
        other = SimpleNamespace(
            name="other",
            workdir="runs/other",
            config=SimpleNamespace(image_size=48, batch_size=4),
            data=SimpleNamespace(num_classes=3),
        )
        with pytest.raises(ConfigError, match="has 3 classes and .* 10 classes"):
            evaluate.comparable([other], run)
        other.config.image_size = 64
        with pytest.raises(ConfigError, match="images of 64 pixels and .* 48 pixels"):
            evaluate.comparable([other], run)

    @pytest.mark.slow
    def test_the_command_on_one_image(self, tmp_path, photo_digits_dir, small, capsys):
        tiny_run.save_untrained(tiny_run.make_config(photo_digits_dir), tmp_path)
        assert evaluate.main(["--workdir", str(tmp_path), "--limit", "1"]) == 0
        assert "one image" in capsys.readouterr().err
        assert (tmp_path / "report.html").exists()
