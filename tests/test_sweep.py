"""Sweeps: what is run and what is not, intervals over seeds, tables and the figure."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from tests import tiny_run
from train import sweep
from train.measure import scores_file
from train.measure.seeds import (
    compare,
    is_certain,
    mean_and_margin,
    summarize,
    summarize_methods,
    unpaired,
)
from train.run import children
from train.show import sweep_figure, sweep_tables


def record(phases, methods=None):
    """What ``scores.read`` gives: phases is dict phase -> means."""
    return {
        "phases": {
            phase: {
                "measures": {"limit": None, "num_images": 9, "means": means},
                "methods": {
                    method: {"limit": None, "num_images": 9, "means": values}
                    for method, values in (methods or {}).get(phase, {}).items()
                },
            }
            for phase, means in phases.items()
        }
    }


RECORDS = {
    0: record({"control": {"box_share": 0.40}, "guided": {"box_share": 0.52}}),
    1: record({"control": {"box_share": 0.30}, "guided": {"box_share": 0.43}}),
    2: record({"control": {"box_share": 0.50}, "guided": {"box_share": 0.61}}),
}


def control(phase):
    return None if phase == "control" else "control"


def refused(config, folder, capsys, *arguments):
    """The line of a command that prints what is there and is refused."""
    assert (
        sweep.main([str(config), "--folder", str(folder), "--table", *arguments]) == 2
    )
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1
    return error


class TestMeanAndMargin:
    @pytest.mark.parametrize("n", [2, 3, 5, 12])
    def test_is_the_t_interval(self, n):
        values = np.random.default_rng(n).normal(size=n)
        mean, margin = mean_and_margin(values)
        low, high = stats.t.interval(
            0.95, n - 1, loc=values.mean(), scale=stats.sem(values)
        )
        np.testing.assert_allclose((mean - margin, mean + margin), (low, high), 1e-6)

    @pytest.mark.parametrize("n, quantile", [(2, 12.706), (3, 4.303), (5, 2.776)])
    def test_quantiles_of_the_printed_tables(self, n, quantile):
        # Values with the standard error 1.
        values = np.zeros(n)
        values[0], values[1] = math.sqrt(n * (n - 1) / 2), -math.sqrt(n * (n - 1) / 2)
        mean, margin = mean_and_margin(values)
        np.testing.assert_allclose((mean, margin), (0.0, quantile), atol=5e-4)

    def test_one_seed_has_no_interval(self):
        mean, margin = mean_and_margin([0.3])
        assert mean == 0.3 and math.isnan(margin)


class TestCompare:
    def test_differences_are_paired(self):
        entry = compare([0.52, 0.43, 0.61], [0.40, 0.30, 0.50])
        # Differences .12, .13, .11: standard deviation .01, three seeds.
        margin = 4.3027 * 0.01 / math.sqrt(3)
        np.testing.assert_allclose(entry["mean"], 0.52)
        np.testing.assert_allclose(entry["difference"], 0.12)
        np.testing.assert_allclose(entry["difference_margin"], margin, 1e-4)
        np.testing.assert_allclose(entry["relative"], 0.30)  # of .40
        np.testing.assert_allclose(entry["relative_margin"], margin / 0.4, 1e-4)
        assert entry["margin"] > 8 * entry["difference_margin"]

    def test_seeds_without_a_value_are_left_out(self):
        entry = compare([0.5, None, 0.7], [0.4, 0.3, None])
        assert entry["n"] == 2
        np.testing.assert_allclose(entry["mean"], 0.6)
        np.testing.assert_allclose(entry["difference"], 0.1)
        assert math.isnan(entry["difference_margin"])
        assert not is_certain(entry)
        assert "difference" not in compare([None], [0.3])


class TestTables:
    def test_marks_what_excludes_zero(self):
        summary = summarize(RECORDS, control)
        first, second = sweep_tables.table(summary).splitlines()[2:]
        assert first == "| control | 0.400 ± 0.248 |"
        assert second == "| guided | **0.520 ± 0.224** |"
        same = {seed: record({"control": r["phases"]["control"]["measures"]["means"],
                              "guided": r["phases"]["control"]["measures"]["means"]})
                for seed, r in RECORDS.items()}  # fmt: skip
        assert "**" not in sweep_tables.table(summarize(same, control))

    def test_only_the_same_images_are_compared(self):
        records = copy.deepcopy(RECORDS)
        for found in records.values():
            found["phases"]["guided"]["measures"]["num_images"] = 4
        summary = summarize(records, control)
        assert summary["guided"]["control"] == "control"
        assert "difference" not in summary["guided"]["measures"]["box_share"]
        assert "**" not in sweep_tables.table(summary)
        (line,) = unpaired(records, summary)
        assert "box_share on 4 and 9" in line
        assert unpaired(RECORDS, summarize(RECORDS, control)) == []
        methods = {"hirescam": {"drop": 0.2}, "ib": {"drop": 0.4}}
        found = record({"guided": {}}, {"guided": methods})
        found["phases"]["guided"]["methods"]["ib"]["num_images"] = 4
        entry = summarize_methods({0: found}, "guided")["guided"]["ib"]["drop"]
        assert entry["mean"] == 0.4 and "ratio" not in entry

    def test_relative_differences(self):
        lines = sweep_tables.relative_table(summarize(RECORDS, control)).splitlines()
        assert lines[2:] == ["| guided | control | **+30.0 ± 6.2 %** |"]

    def test_a_phase_may_have_another_control_or_none(self):
        class Module:
            CONTROL = "control"
            CONTROLS = {"scratch": "alone", "plain": None}

        controls = sweep.controls_of(Module)
        found = {p: controls(p) for p in ("control", "alone", "scratch", "plain", "b")}
        assert found == {
            "control": None,
            "alone": None,
            "scratch": "alone",
            "plain": None,
            "b": "control",
        }

    def test_methods_against_our_map(self):
        methods = {
            0: {"hirescam": {"drop": 0.2}, "ib": {"drop": 0.4}},
            1: {"hirescam": {"drop": 0.3}, "ib": {"drop": 0.5}},
        }
        records = {s: record({"guided": {}}, {"guided": m}) for s, m in methods.items()}
        summary = summarize_methods(records, "guided")
        entry = summary["guided"]["ib"]["drop"]
        np.testing.assert_allclose((entry["mean"], entry["ratio"]), (0.45, 0.55))
        assert (
            "| ib | guided | 45.0 ± 63.5 (0.55 ± 0.64) |"
            in sweep_tables.method_table(summary, "guided")
        )

    def test_figure(self, tmp_path):
        summary = summarize(RECORDS, control)
        path = sweep_figure.write_dots(summary, RECORDS, tmp_path / "a" / "dots.png")
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5
        guided = summary["guided"]["measures"]["box_share"]
        assert sweep_figure._colour(guided, "higher") == sweep_figure.COLOURS[True]
        assert sweep_figure._colour(guided, "lower") == sweep_figure.COLOURS[False]
        alone = summary["control"]["measures"]["box_share"]
        assert sweep_figure._colour(alone, "higher") == sweep_figure.UNSURE


def test_what_is_not_measured_is_told(config, tmp_path, capsys):
    for seed, found in RECORDS.items():
        (tmp_path / f"seed_{seed}").mkdir()
        path = scores_file.path(tmp_path / f"seed_{seed}", "validation")
        path.write_text(json.dumps(found))
    for flag in ("--phases", "--against"):
        line = refused(config, tmp_path, capsys, flag, "nope")
        assert f"{flag} nope: not measured on validation; what is: control" in line
    figure = ["--figure", str(tmp_path / "x.png")]
    line = refused(config, tmp_path, capsys, "--columns", "iou", *figure)
    assert "--columns iou: not measured on validation; what is: box_share" in line
    path.write_text("{")
    assert "is damaged; delete it" in refused(config, tmp_path, capsys)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "few.py"
    path.write_text('SEEDS = (0, 1, 2)\nCONTROL = "control"\nFINAL = ("control",)\n')
    return path


# What stands in for the training and the measuring of a seed: quick, and it counts.
FAKE = """
import json, os, pathlib, sys
task, seed, workdir, split, *phases = sys.argv[1:]
workdir = pathlib.Path(workdir)
workdir.mkdir(parents=True, exist_ok=True)
with open(workdir.parent / "calls", "a") as file:
    file.write(f"{task} {seed} {split} {phases}\\n")
if task == "train":
    if seed == os.environ.get("BROKEN_SEED"):
        print("\\n".join(f"line {n}" for n in range(20)))
        sys.exit(3)
    (workdir / "config.json").write_text('{"phases": ["control", "guided"]}')
    (workdir / "models").mkdir(exist_ok=True)
    for phase in ("control", "guided"):
        (workdir / "models" / f"{phase}.npz").touch()
else:
    part = {"limit": None, "num_images": 2, "means": {"nll": float(seed)}}
    phases = {phase: {"measures": part} for phase in phases}
    text = json.dumps({"phases": phases})
    (workdir / f"scores_{split}.json").write_text(text)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Replaces the two commands; returns the folder's list of what ran."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def train_command(config_path, seed, workdir, jobs):
        return [sys.executable, str(script), "train", str(seed), str(workdir), "-"]

    def scores_command(workdir, arguments, phases):
        return [
            *(sys.executable, str(script), "measure", workdir.name[-1], str(workdir)),
            *(arguments.split, *(phases or ["control", "guided"])),
        ]

    monkeypatch.setattr(children, "train_command", train_command)
    monkeypatch.setattr(children, "scores_command", scores_command)
    calls = tmp_path / "runs" / "calls"

    def read_calls():
        lines = sorted(calls.read_text().splitlines()) if calls.exists() else []
        calls.unlink(missing_ok=True)
        return lines

    return read_calls


class TestMain:
    @pytest.mark.parametrize("jobs", ["1", "2"])
    def test_a_second_call_runs_nothing(self, jobs, config, fake, tmp_path, capfd):
        folder = tmp_path / "runs"
        arguments = [str(config), "--folder", str(folder), "--num-perturbed", "0"]
        arguments += ["--jobs", jobs]
        assert sweep.main(arguments) == 0
        ran = fake()
        assert [call.split()[:2] for call in ran] == [
            [task, seed] for task in ("measure", "train") for seed in "012"
        ]
        out = capfd.readouterr().out
        assert "seed 1: train and measure done" in out and "3 of 3" in out
        assert "| control | 1.000 ± 2.484 |" in out
        summary = json.loads((folder / "summary_validation.json").read_text())
        assert summary["seeds"] == [0, 1, 2]
        assert sweep.main(arguments) == 0
        assert fake() == []

    def test_the_test_split_is_for_what_is_final(self, config, fake, tmp_path):
        arguments = [str(config), "--folder", str(tmp_path / "runs")]
        arguments += ["--num-perturbed", "0"]
        assert sweep.main(arguments) == 0
        assert all("test" not in call for call in fake())
        assert sweep.main([*arguments, "--split", "test"]) == 0
        assert fake() == [f"measure {seed} test ['control']" for seed in range(3)]

    def test_a_failing_seed_is_told_and_the_others_go_on(
        self, config, fake, tmp_path, capfd, monkeypatch
    ):
        monkeypatch.setenv("BROKEN_SEED", "1")
        arguments = [str(config), "--folder", str(tmp_path / "runs")]
        arguments += ["--num-perturbed", "0"]
        assert sweep.main([*arguments, "--jobs", "2"]) == 1
        out = capfd.readouterr().out
        assert "seed 1: failed to train (exit status 3)\n" in out
        assert "    line 19\n" in out and "line 10" not in out
        assert "2 seeds, validation split" in out
        monkeypatch.delenv("BROKEN_SEED")
        fake()
        assert sweep.main(arguments) == 0
        assert fake() == ["measure 1 validation ['control', 'guided']", "train 1 - []"]

    def test_table_trains_and_measures_nothing(self, config, fake, tmp_path, capsys):
        folder = tmp_path / "runs"
        arguments = [str(config), "--folder", str(folder), "--table"]
        assert sweep.main(arguments) == 2
        assert "no seed" in capsys.readouterr().err
        for seed, found in RECORDS.items():
            path = scores_file.path(folder / f"seed_{seed}", "validation")
            path.parent.mkdir(parents=True)
            more = copy.deepcopy(found)
            for part in more["phases"].values():
                part["measures"]["means"]["worst_class"] = 0.1
            path.write_text(json.dumps(more))
        arguments += ["--phases", "guided", "--figure"]
        assert sweep.main([*arguments, str(tmp_path / "some.png")]) == 0
        arguments += [str(tmp_path / "two.png"), "--columns", "box_share"]
        assert sweep.main([*arguments, "worst_class"]) == 0
        out = capsys.readouterr().out
        assert "3 seeds" in out and "| **0.520 ± 0.224** |" in out
        assert "| control |" not in out.replace("| guided | control |", "")
        widths = []
        for name in ("some.png", "two.png"):
            with Image.open(tmp_path / name) as image:
                widths.append(image.width)
        assert widths[0] < widths[1]  # a panel for each column that was asked for
        written = (folder / "summary_validation.json").read_text()
        arguments = [str(config), "--folder", str(folder), "--table"]
        shown = [*arguments, "--against", "guided", "--columns", "box_share"]
        assert sweep.main(shown) == 0
        out = capsys.readouterr().out
        assert "from guided excludes zero" in out
        assert "| control | guided | **-23.1 ± 4.8 %** |" in out
        assert (folder / "summary_validation.json").read_text() == written
        assert fake() == []

    def test_mistakes_are_one_line(self, config, tmp_path, capsys):
        assert sweep.main([str(tmp_path / "none.py")]) == 2
        assert "no file" in capsys.readouterr().err
        path = tmp_path / "some.py"
        path.write_text(
            "from types import SimpleNamespace as S\nSEEDS, CONTROL = (0,), 'control'\n"
            "get_config = lambda: S(phases=('control', 'guided'))"
        )
        assert sweep.main([str(path), "--table", "--against", "nobody"]) == 2
        assert "--against nobody: no phase of" in capsys.readouterr().err
        assert sweep.main([str(config), "--jobs", "0"]) == 2
        assert "--jobs: 0" in capsys.readouterr().err


class TestRunSeeds:
    def test_an_interrupt_stops_the_children(
        self, config, tmp_path, monkeypatch, capsys
    ):
        pids = tmp_path / "pids"
        script = f"import os, time; open({str(pids)!r}, 'a').write(str(os.getpid()))"
        command = [sys.executable, "-c", f"{script}; time.sleep(60)"]
        monkeypatch.setattr(children, "train_command", lambda *args: command)

        def interrupt():
            while not pids.exists() or not pids.read_text():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=interrupt)
        thread.start()
        arguments = [str(config), "--folder", str(tmp_path / "runs"), "--seeds", "1"]
        assert sweep.main(arguments) == 130
        thread.join()
        assert "goes on" in capsys.readouterr().err
        with pytest.raises(ProcessLookupError):
            os.kill(int(pids.read_text()), 0)

    def test_jobs_share_the_cores(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7, 8})
        assert children.cores_of(2) == [[2, 5, 8], [3, 7]]
        assert children.cores_of(6)[5] == [2]
        assert children.cores_of(1) == [None]


class TestEndToEnd:
    @pytest.mark.slow
    def test_a_seed_is_trained_and_measured(
        self, tmp_path, photo_digits_dir, monkeypatch, capsys
    ):
        config = tiny_run.make_config(photo_digits_dir, phases=("plain",))
        with config.unlocked():
            config.plain.num_epochs = 1.0
        text = config.to_json_best_effort()
        path = tmp_path / "one.py"
        path.write_text(
            textwrap.dedent(
                f"""
                import json
                from ml_collections import ConfigDict
                from train.run.saved_run import _tuples

                SEEDS = (3,)
                CONTROL = "plain"
                TEXT = {text!r}

                def get_config():
                    return ConfigDict(_tuples(json.loads(TEXT)))
                """
            )
        )
        folder = tmp_path / "runs"
        arguments = [str(path), "--folder", str(folder), "--num-perturbed", "0"]
        monkeypatch.delenv("XLA_FLAGS")
        command = [sys.executable, "-m", "train.sweep", *arguments, "--jobs", "2"]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "seed 3: train and measure done" in ended.stdout
        assert "note" not in ended.stderr
        found = scores_file.read(folder / "seed_3", "validation")
        assert list(found["phases"]) == ["plain"] and found["seed"] == 3
        # Training knew the validation split only, and gave the same mean.
        saved = json.loads((folder / "seed_3" / "config.json").read_text())
        assert saved["test_split"] == "validation"
        assert not (folder / "seed_3" / "results.json").exists()
        lines = (folder / "seed_3" / "metrics.jsonl").read_text().splitlines()
        last = [json.loads(line) for line in lines if '"validation"' in line][-1]
        measured = scores_file.means(found["phases"]["plain"])
        np.testing.assert_allclose(measured["nll"], last["nll"], 1e-5)
        # A phase that the file gets later is trained and measured, and no other.
        before = found["phases"]["plain"]
        more = text.replace('"phases": ["plain"]', '"phases": ["plain", "control"]')
        assert more != text
        path.write_text(path.read_text().replace(text, more))
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "seed 3: train and measure done" in ended.stdout
        found = scores_file.read(folder / "seed_3", "validation")
        assert list(found["phases"]) == ["plain", "control"]
        assert found["phases"]["plain"] == before
        # A changed file is told, and what was trained is taken as it is.
        path.write_text(path.read_text().replace('"log_every": 3', '"log_every": 5'))
        assert sweep.main([*arguments, "--table"]) == 0
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "log_every (3 -> 5)" in error
