import json
import math

import numpy as np
import pytest
from scipy import stats

from train import sweep

RESULTS = [
    {"control": {"box_share": 0.40}, "guided": {"box_share": 0.52}},
    {"control": {"box_share": 0.30}, "guided": {"box_share": 0.43}},
    {"control": {"box_share": 0.50}, "guided": {"box_share": 0.61}},
]


class TestMeanAndMargin:
    @pytest.mark.parametrize("n", [2, 3, 5, 10])
    def test_is_the_t_interval(self, n):
        values = np.random.default_rng(n).normal(size=n)
        mean, margin = sweep.mean_and_margin(values)
        low, high = stats.t.interval(
            0.95, n - 1, loc=values.mean(), scale=stats.sem(values)
        )
        # The quantiles are tabulated to three digits after the point.
        np.testing.assert_allclose((mean - margin, mean + margin), (low, high), 1e-3)

    def test_one_seed_has_no_interval(self):
        mean, margin = sweep.mean_and_margin([0.3])
        assert mean == 0.3 and math.isnan(margin)


class TestTable:
    def test_differences_are_paired(self):
        summary = sweep.summarize(RESULTS, "control")
        entry = summary["guided"]["box_share"]
        np.testing.assert_allclose(entry["difference"], 0.12)
        # The seeds differ by .1, the pairs by .01.
        assert entry["difference_margin"] < 0.03 < entry["margin"]

    def test_marks_what_excludes_zero(self):
        text = sweep.table(sweep.summarize(RESULTS, "control"), "control")
        control, guided = text.splitlines()[2:]
        assert "**" not in control and "**0.520" in guided
        unsure = [{"control": r["control"], "guided": r["control"]} for r in RESULTS]
        assert "**" not in sweep.table(sweep.summarize(unsure, "control"), "control")


class TestMain:
    def test_table_of_what_is_finished(self, tmp_path, capsys):
        config = tmp_path / "few.py"
        config.write_text('SEEDS = (0, 1, 2)\nCONTROL = "control"\n')
        for seed, phases in enumerate(RESULTS[:2]):
            folder = tmp_path / "runs" / f"seed_{seed}"
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps({"phases": phases}))
        arguments = [str(config), "--folder", str(tmp_path / "runs"), "--table"]
        assert sweep.main(arguments) == 0
        assert "2 seeds" in capsys.readouterr().out
        summary = json.loads((tmp_path / "runs" / "summary.json").read_text())
        assert summary["seeds"] == [0, 1]

    def test_mistakes_are_one_line(self, tmp_path, capsys):
        assert sweep.main([str(tmp_path / "none.py")]) == 2
        assert "no file" in capsys.readouterr().err
        config = tmp_path / "few.py"
        config.write_text('SEEDS = (0,)\nCONTROL = "control"\n')
        arguments = [str(config), "--folder", str(tmp_path), "--table"]
        assert sweep.main(arguments) == 2
        assert "no finished seed" in capsys.readouterr().err
