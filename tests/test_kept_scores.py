"""The scores that the repository keeps: `train.sweep --table --folder` reads them."""

from pathlib import Path

import pytest

from train.measure.seeds import read_scores, summarize
from train.sweep import controls_of, load_module

ROOT = Path(__file__).parent.parent
FOLDERS = sorted((ROOT / "benchmarks" / "results").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_seed_has_every_phase_of_its_sweep(folder):
    sweep = load_module(ROOT / "configs" / "sweeps" / f"{folder.name}.py")
    phases = set(sweep.get_config().phases)
    splits = {path.stem.removeprefix("scores_") for path in folder.glob("*/scores_*")}
    assert splits
    for split in splits:
        records = read_scores(folder, sweep.SEEDS, split)
        assert list(records) == list(sweep.SEEDS)
        assert all(set(record["phases"]) == phases for record in records.values())
        control_of = controls_of(sweep)
        summary = summarize(records, control_of)
        for name in phases:
            nll = summary[name]["measures"]["nll"]
            assert ("relative" in nll) == (control_of(name) is not None), name
