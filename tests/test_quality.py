"""The benchmark of quality against price: what it keeps, counts and prints."""

import json

import numpy as np
import pytest

from benchmarks import quality
from ibsgl_jax.bottleneck import FAST, BottleneckConfig


@pytest.fixture
def case():
    return quality.Case("net, random", *[np.zeros(3)] * 6, is_trained=False)


def test_passes_are_the_gradients_that_a_map_needs():
    assert quality.num_passes(BottleneckConfig()) == 90
    assert quality.num_passes(FAST) == 8
    assert quality.num_passes("hirescam") == 1
    assert quality.num_passes(quality.REFERENCE) == 59 * 100


def test_every_setting_has_a_file_of_its_own():
    settings = {**quality.VARIANTS, "reference": quality.REFERENCE}
    names = {quality.file_name(how) for how in settings.values()}
    assert len(names) == len(settings)


def test_a_stopped_run_goes_on_where_it_was(case, tmp_path, monkeypatch):
    solved = []

    def solve(features_fn, head_fn, images, classes, key, moments, *, how):
        solved.append(len(solved))
        if len(solved) == 3:
            raise KeyboardInterrupt
        return np.full((1, 2, 2), solved[-1], np.float32)

    monkeypatch.setattr(quality, "solve", solve)
    with pytest.raises(KeyboardInterrupt):
        quality.maps_of(case, FAST, tmp_path, "FAST")
    maps = quality.maps_of(case, FAST, tmp_path, "FAST")
    np.testing.assert_array_equal(maps[:, 0, 0], [0, 1, 3])
    np.testing.assert_array_equal(quality.maps_of(case, FAST, tmp_path, "FAST"), maps)
    assert len(solved) == 4


def test_rows_of_other_networks_stay(tmp_path):
    def row(network, value):
        return {
            "network": network,
            "variant": "FAST",
            "images": 2,
            "passes": 8,
            "price": 4.0,
            "rank_correlation": value,
            "quartiles": [value, value],
        }

    quality.keep([row("a", 0.5), row("b", 0.6)], tmp_path)
    quality.keep([row("b", 0.7)], tmp_path)
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [(r["network"], r["rank_correlation"]) for r in rows] == [
        ("a", 0.5),
        ("b", 0.7),
    ]
    assert (tmp_path / "quality.png").stat().st_size > 1000
    assert "| b | FAST | 8 | 4.0 | 0.700 (0.700-0.700) |" in quality.table(rows)


def test_wrong_weights_are_one_line(capsys):
    with pytest.raises(SystemExit):
        quality.main(["--weights", "resnet5=x.pth"])
    assert "give NETWORK=FILE" in capsys.readouterr().err.splitlines()[-1]
