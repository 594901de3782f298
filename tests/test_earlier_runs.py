"""What commit a7f40d5 left of a run is read: `tests/data/earlier_run.zip`.

Its trainer made it from ``tiny_run.make_config("data", phases=("plain", "guided"))``
with ``model_options.num_filters = 2``, on one CPU.
"""

import json
import zipfile

import numpy as np
import pytest

from ibsgl_jax.app import cli
from tests import tiny_run
from tests.layers import ROOT
from tests.pictures import draw
from train import evaluate, scores
from train.errors import ConfigError
from train.run import loop

# What measures are made of.
NO_MEASURES = {"confidence", "probability", "runner_up_probability"}
PHASES = ["plain", "guided"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, photo_digits_dir):
    """The folder of the run, its data where these tests have them."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    with zipfile.ZipFile(ROOT / "tests" / "data" / "earlier_run.zip") as archive:
        archive.extractall(folder)
    config = json.loads((folder / "config.json").read_text())
    config["data_dir"] = str(photo_digits_dir)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_scores_are_those_that_it_had_itself(run):
    assert scores.main(["--workdir", str(run), "--split=test", "--no-progress"]) == 0
    phases = json.loads((run / "scores_test.json").read_text())["phases"]
    before = json.loads((run / "results.json").read_text())["phases"]
    assert list(phases) == list(before) == PHASES
    for phase in PHASES:
        means = phases[phase]["measures"]["means"]
        assert before[phase].keys() - means.keys() == NO_MEASURES
        for key in before[phase].keys() & means.keys():
            # Of 24 images; another processor rounds otherwise.
            np.testing.assert_allclose(
                means[key], before[phase][key], rtol=1e-3, err_msg=key
            )


@pytest.mark.slow  # eleven methods
def test_it_is_evaluated(run):
    assert evaluate.main(["--workdir", str(run), "--limit=4", "--no-progress"]) == 0
    assert list(json.loads((run / "evaluation.json").read_text())["phases"]) == PHASES
    assert (run / "report.html").is_file()


def test_its_model_explains_photos(run, tmp_path):
    draw(0).save(tmp_path / "photo.png")
    out = tmp_path / "maps"
    arguments = ["--checkpoint", str(run), "--method=ib,hirescam", "--out", str(out)]
    assert cli.main(["explain", str(tmp_path / "photo.png"), *arguments]) == 0
    with np.load(out / "maps.npz") as maps:
        assert np.isfinite(maps["ib"]).all() and np.isfinite(maps["hirescam"]).all()


def test_it_is_not_continued(run, photo_digits_dir):
    """The fields that it lacks may mean something else: one line, nothing written."""
    config = tiny_run.make_config(photo_digits_dir, phases=tuple(PHASES))
    with config.unlocked():
        config.model_options.num_filters = 2
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(ConfigError, match="holds a run of another config") as refusal:
        loop.train_and_evaluate(config, run)
    assert len(refusal.value.lines) == 1
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert {p: t for p, t in after.items() if p.name != ".lock" and p != run} == {
        p: t for p, t in before.items() if p.name != ".lock" and p != run
    }
