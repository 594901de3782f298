"""The whole road with several labels per picture, on drawn pairs of shapes."""

import json

import jax
import numpy as np
import pytest

from ibsgl_jax import trained
from ibsgl_jax.app import cli
from tests import shapes, tiny_run
from train import evaluate, scores, teachers
from train.run import loop, saved_run

PHASES = ("plain", "guided")


def make_config(**changes):
    """configs/photos.py with a network of seconds."""
    config = tiny_run.make_photos_config()
    config.link = "sigmoid"
    config.phases = PHASES
    config.plain.init = "random"
    config.plain.num_epochs = 10.0
    config.guided.every = 1
    config.guided.release = 0.0
    config.save_epochs = 5.0
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A run of both phases: its folder of pictures, its workdir, its results."""
    top = tmp_path_factory.mktemp("several_road")
    folder = shapes.fill(top / "shapes")
    loop.train_and_evaluate(make_config(data=str(folder)), top / "run")
    return folder, top / "run", json.loads((top / "run/results.json").read_text())


class TestTraining:
    def test_it_ranks_better_than_chance(self, road):
        for phase in PHASES:
            check, means = road[2]["sanity"][phase], road[2]["phases"][phase]
            assert means["mean_ap"] == pytest.approx(check["mean_ap"])
            assert check["mean_ap"] > check["chance"] + 0.1
            assert check["verdict"] != "chance"
            assert len(check["frequency"]) == 3 and "confusion" not in check
            assert 0 <= means["accuracy"] <= means["label_accuracy"] <= 1
            assert means["nll"] < np.log(2)

    def test_the_start_is_chosen_by_the_likelihood(self, road):
        starts = json.loads((road[1] / "starts.json").read_text())
        lines = (road[1] / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        last = [x for x in found if (x["phase"], x["split"]) == ("plain", "validation")]
        assert starts["guided"]["validation"]["plain"]["nll"] == last[-1]["nll"]

    def test_it_was_guided(self, road):
        lines = (road[1] / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        guided = [x for x in found if (x["phase"], x["split"]) == ("guided", "train")]
        assert guided[-1]["kl"] > 0
        assert guided[-1]["saliency_loss_at_target"] < guided[-1]["saliency_loss"]

    def test_explain_shows_sigmoid_probabilities(self, road, tmp_path):
        assert trained.load(road[1] / "models/guided.npz").link == "sigmoid"
        out, photo = tmp_path / "maps", str(road[0] / "1.png")
        arguments = [photo, f"--checkpoint={road[1]}", "--method=ib,hirescam"]
        assert cli.main(["explain", *arguments, f"--out={out}"]) == 0
        told = json.loads((out / "explanation.json").read_text())
        assert told["link"] == "sigmoid"
        for found in told["photos"][0]["predicted"]:
            expected = 1 / (1 + np.exp(-found["logit"]))
            assert found["probability"] == pytest.approx(expected, rel=1e-5)


class TestAfterwards:
    @pytest.mark.slow
    def test_it_is_evaluated(self, road):
        run = saved_run.Run(road[1])
        source = saved_run.open_split(run)
        options = evaluate.Options(
            num_perturbed=2,
            deletion_only=True,
            num_sensitivity=0,
            num_method_images=2,
            methods=("ib", "hirescam"),
            pictures=False,
        )
        results, per_example = evaluate.evaluate_run(
            run, source, options=options, progress=False
        )
        evaluate.write_evaluation(results, per_example, run.workdir)
        page = evaluate.report.write_report(run, source, results, per_example)
        mean = results["phases"]["plain"]["mean_ap"]
        assert mean["low"] <= mean["mean"] <= mean["high"]
        assert mean["mean"] == pytest.approx(road[2]["phases"]["plain"]["mean_ap"])
        assert "calibration_error" not in results["phases"]["plain"]
        assert "temperature" in results["phases"]["plain"]
        assert results["majority"] is None
        assert any("have no label" in note for note in results["notes"]) == bool(
            results["unlabelled"]
        )
        assert all("are not finite" not in note for note in results["notes"])
        text = (run.workdir / "evaluation.md").read_text()
        assert "frequency (chance)" in text and "| mAP ↑ |" in text
        html = page.read_text()
        assert "average precision before" in html and "Who is taken" not in html

    def test_scores_and_teachers(self, road):
        limits = {"measures": None, "deletion": 0, "perturbed": 0, "methods": 0}
        record, notes = scores.measure_run(
            road[1], "test", phases=["plain"], limits=limits, progress=False
        )
        assert not notes
        means = record["phases"]["plain"]["measures"]["means"]
        for name in ("mean_ap", "top_label", "label_accuracy", "drop", "nll"):
            assert means[name] == pytest.approx(road[2]["phases"]["plain"][name])
        run = saved_run.Run(road[1], phases=["plain"])
        source = saved_run.open_split(run, "test")
        found = teachers.measure(run, "plain", source, teachers.Teacher("", 3, 1))
        assert all(np.isfinite(value) for value in found.values())
        assert -1.0 <= found["class_correlation"] <= 1.0


def test_examples_from_python(tmp_path):
    examples = [
        {"image": np.asarray(shapes.draw(names, seed)), "label": list(names)}
        for seed, names in enumerate(shapes.label_sets(40))
    ]
    config = make_config(phases=("plain",))
    config.plain.num_epochs = 1.0
    outcome = loop.train_and_evaluate(
        config, tmp_path / "run", data=examples, table=False
    )
    state, _ = outcome["plain"]
    assert int(state.step) > 0
    assert jax.tree.all(
        jax.tree.map(lambda x: bool(np.isfinite(x).all()), state.params)
    )
