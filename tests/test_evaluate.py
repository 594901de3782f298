"""The command that evaluates: its files, going on, its bar, notes and bad input."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ibsgl_jax import attribution
from tests import tiny_run
from train import evaluate
from train.errors import ConfigError
from train.measure.catalogue import MEASURES, OF_SEVERAL
from train.measure.parts import Parts
from train.run import saved_run


class TestFiles:
    def test_json_holds_every_measure_with_its_definition(self, evaluated):
        run, _, _, per_example = evaluated
        text = (run.workdir / "evaluation.json").read_text()
        results = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
        for phase in ("plain", "guided"):
            measured = results["phases"][phase]
            assert measured.keys() == MEASURES.keys() - OF_SEVERAL
            for key, entry in measured.items():
                assert entry["low"] <= entry["mean"] <= entry["high"] or key in (
                    "calibration_error",  # resampling adds to it
                    "worst_class",  # and takes off this one
                )
        counts = {key: entry["n"] for key, entry in measured.items()}
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
        assert not any("other data" in note for note in results["notes"])
        other = saved_run.Run(tmp_path / "other")
        other.config.dataset = "photo_digits/other"
        (note,) = evaluate.notes_of(
            results, [saved_run.Run(tmp_path / "one"), other], results["num_images"]
        )[:1]
        assert note.startswith("other learned from other data than one: ")
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
            data=SimpleNamespace(num_classes=3, class_names=None),
        )
        with pytest.raises(ConfigError, match="has 3 classes and .* 10 classes"):
            evaluate.comparable([other], run)
        other.data = SimpleNamespace(num_classes=10, class_names=list("0123465789"))
        with pytest.raises(ConfigError, match="class 5 is 6 in runs/other and 5 in"):
            evaluate.comparable([other], run)
        other.config.image_size = 64
        with pytest.raises(ConfigError, match="images of 64 pixels and .* 48 pixels"):
            evaluate.comparable([other], run)
        other.config.link = "sigmoid"
        with pytest.raises(ConfigError, match="link=sigmoid and .* link=softmax: they"):
            evaluate.comparable([other], run)

    @pytest.mark.slow
    def test_the_command_on_one_image(self, tmp_path, photo_digits_dir, small, capsys):
        tiny_run.save_untrained(tiny_run.make_config(photo_digits_dir), tmp_path)
        assert evaluate.main(["--workdir", str(tmp_path), "--limit", "1"]) == 0
        assert "one image" in capsys.readouterr().err
        assert (tmp_path / "report.html").exists()
