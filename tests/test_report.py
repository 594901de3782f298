"""The report: what it says, that it needs nothing but itself, and that it works."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import quickstart
from ibsgl_jax import attribution
from train.configuration import reproducing_command
from train.measure.catalogue import MEASURES, OF_SEVERAL
from train.show import charts, figures, gallery, report, tables


@pytest.fixture(scope="session")
def page(evaluated):
    """The path of the report of the tiny run."""
    run, source, results, per_example = evaluated
    return report.write_report(run, source, results, per_example)


CONTEXT = dict(
    results=dict(
        run="<b>x",
        num_images=3,
        split="test",
        seconds=3.2,
        device="cpu",
        notes=["<b>x"],
        before="plain",
        after="guided",
        num_method_images=2,
        phases={"plain": {}},
    ),
    dataset="d",
    model="m",
    names=["</script><b>x", "b"],
    headline=[(MEASURES["nll"], "0.1", "0.2", None)],
    phases=[("Prediction", [(MEASURES["nll"], 3, [{"value": "", "text": "–"}])])],
    methods={"columns": [], "rows": []},
    sanity=[],
    classes={
        "score": "accuracy",
        "last": "taken for",
        "boxes": False,
        "left_out": 2,
        "rows": [{"name": "<b>x", "n": 3, "values": [(None, "–")], "taken_for": ""}],
    },
    confusions=[
        {"phase": "plain", "rows": [("<b>x", [(3, 1.0)])], "pairs": []},
        {"phase": "guided", "rows": [], "pairs": [("<b>x", "b", 1)]},
    ],
    figures=[],
    training={"legend": [], "charts": []},
    perturbation={"legend": [], "charts": []},
    gallery=[],
    definitions=[],
    command="<b>x",
    config="{}",
)


def page_data(page):
    """What the page's script shows."""
    text = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    return json.loads(text)


class TestMarkdown:
    def test_has_a_row_per_measure_and_per_method_and_model(self, evaluated):
        run, _, results, _ = evaluated
        text = tables.evaluation_markdown(results)
        assert text == (run.workdir / "evaluation.md").read_text()
        rows = [line for line in text.splitlines() if line.startswith("| ")]
        for key, measure in MEASURES.items():
            if key in OF_SEVERAL:
                continue
            assert any(row.startswith(f"| {measure.title}") for row in rows)
            assert f"**{measure.title}**: {measure.definition}" in text
        assert len(
            [r for r in rows if re.search(r"\| (plain|guided) \|", r)]
        ) >= 2 * len(attribution.METHODS)
        assert sum("**ours: L^c of the guided model**" in row for row in rows) == 1

    def test_percent_and_missing_values(self):
        entry = {"mean": 0.1234, "low": 0.1, "high": float("nan")}
        assert tables.with_interval("drop", entry) == "12.3 [10.0, –]"
        assert tables.with_interval("iou", entry) == "0.123 [0.100, –]"
        assert tables.with_interval("iou", None) == "–"

    def test_localisation_can_be_absent(self, evaluated):
        results = json.loads(json.dumps(evaluated[2]))
        local = {k for k, m in MEASURES.items() if m.group == "Localisation"}
        rows = [
            *results["phases"].values(),
            *(r["measures"] for r in results["methods"]),
        ]
        for row in rows:
            for key in local & row.keys():
                del row[key]
        results["notes"] = ["split x has neither boxes nor masks"]
        text = tables.evaluation_markdown(results)
        assert "neither boxes" in text and "pointing" not in text
        assert "AD %" in text


class TestPage:
    def test_needs_nothing_but_itself(self, page):
        text = page.read_text()
        assert page.stat().st_size < 6e6
        assert "{{" not in text
        sources = re.findall(r"""(?:src|href)=["']?([^"' >]*)""", text)
        assert sources
        assert all(s.startswith(("data:", "#")) for s in sources)
        assert not re.search(r"https?://(?!www\.w3\.org)|@import|url\(", text)

    def test_holds_tables_curves_pictures_and_the_command(self, page):
        text = page.read_text()
        assert text.count("<figure><h3>") == 3
        assert 'aria-label="loss"' in text and 'aria-label="accuracy"' in text
        assert "python -m train --config=" in text
        for name in ("before_after.png", "suppression.png", "deletion.png"):
            assert (page.parent / name).stat().st_size > 10_000

    def test_notes_are_escaped(self, evaluated, page, monkeypatch):
        monkeypatch.setattr(report, "_draw_figures", lambda *_: [])
        monkeypatch.setattr(report, "gallery", lambda *_: [])
        run, source, results, per_example = evaluated
        renamed = json.loads(json.dumps(results))
        renamed["notes"] = ["<img src=x> & co"]
        before = page.read_text()
        try:
            report.write_report(run, source, renamed, per_example)
            text = page.read_text()
        finally:
            page.write_text(before)
        assert "&lt;img src=x&gt; &amp; co" in text and "<img src=x>" not in text

    def test_gallery_says_what_was_measured(self, evaluated, page):
        _, source, _, per_example = evaluated
        entries = page_data(page)["entries"]
        assert {entry["index"] for entry in entries} == set(range(len(source)))
        for entry in entries:
            i = entry["index"]
            assert entry["label"] == source[i]["label"]
            assert entry["right"] == [
                per_example[f"{p}/accuracy"][i] > 0 for p in ("plain", "guided")
            ]
            np.testing.assert_allclose(
                entry["share"],
                [per_example[f"{p}/box_share"][i] for p in ("plain", "guided")],
                atol=6e-4,  # rounded to three digits
            )


class TestGallery:
    def test_takes_the_worst_the_first_and_what_changed(self, monkeypatch):
        monkeypatch.setattr(gallery, "GALLERY", dict.fromkeys(gallery.GALLERY, 1))
        chosen = gallery.choose(
            [np.array([1.0, 0, 1, 1, 0]), np.array([1.0, 1, 0, 1, 0])],
            [np.array([0.0, 1, 2, 3, 4]), np.array([0.0, 0, 1, 3, 5])],
            [None, np.array([0.9, 0.8, 0.2, 0.7, 0.1])],
            [None, None],
        )
        assert chosen == [4, 0, 1, 2]
        assert gallery.choose(
            *[[np.ones(2)] * 2] * 3, [np.zeros(2), np.array([0.1, -0.5])]
        ) == [0, 1]

    def test_a_negligible_map_is_no_colour(self):
        axis = figures.grid(1, 1)[1][0, 0]
        heat = np.eye(4)
        for strength, expected in ((1.0, 1.0), (50.0, 1.0), (1e-3, 1e-3)):
            figures.show_heat(axis, 1e-6 * heat, 1e-6 * heat, strength=strength)
            np.testing.assert_allclose(axis.images[-1].get_array().max(), expected)
        for bad in (np.nan * heat, np.inf + heat):
            figures.show_heat(axis, bad, bad, strength=bad.sum())
            assert axis.images[-1].get_array().max() == 0.0


class TestTemplate:
    def test_names_are_text(self, tmp_path):
        text = report.render(**CONTEXT)
        assert "<b>x" not in text and "&lt;b&gt;x" in text
        data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
        assert json.loads(data)["names"] == ["</script><b>x", "b"]


class TestCharts:
    def test_ticks_are_round_and_cover(self):
        assert charts.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        assert charts.ticks(0.13, 0.87) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        assert charts.ticks(2.0, 2600.0)[-1] == 3000.0

    def test_gaps_and_single_points_are_drawn(self):
        points = [(0, 1.0), (1, None), (2, float("nan")), (3, 2.0)]
        chart = charts.chart("t", "x", [(0, "a", True, points)])
        (line,) = chart["lines"]
        assert len(line["dots"]) == 2 and "nan" not in line["path"]
        # From the lower left to the upper right corner of the axes.
        assert line["dots"] == [(46, 166), (310, 12)]
        (line,) = charts.chart("t", "x", [(0, "a", False, [(5, 1.0)])])["lines"]
        assert line["path"].startswith("M310 ") and not line["dots"]

    def test_later_phases_start_where_theirs_began(self, evaluated):
        # plain ends at step 8, guided's last is 8 + 8: a tick at 15 must be there.
        first = charts.training_charts(evaluated[0])["charts"][0]
        assert "15" in [text for _, text in first["columns"]]

    def test_a_half_written_line_of_the_log_is_passed_over(self, evaluated, tmp_path):
        run = evaluated[0]
        text = (run.workdir / "metrics.jsonl").read_text()
        (tmp_path / "metrics.jsonl").write_text(text + '{"phase": "guided", "st')
        other = SimpleNamespace(workdir=tmp_path, config=run.config)
        assert charts.training_charts(other) == charts.training_charts(run)


def parsed(command):
    """The configuration and the folder that the command's words stand for."""
    # A shell joins lines at a backslash; shlex does not.
    words = shlex.split(command.replace("\\\n", ""))
    words = words[words.index("train") + 1 :]
    words = words[: words.index("python")] if "python" in words else words
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", flag_values=values, lock_config=True, sys_argv=["train", *words]
    )
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    rest = values(["train", *words])
    assert rest == ["train"]
    return values.config, values.workdir


def config_of(name):
    return importlib.import_module("configs." + name).get_config()


def changed_config(name, **changes):
    config = config_of(name)
    for field, value in changes.items():
        target = config
        *path, last = field.split("__")
        for part in path:
            target = target[part]
        target[last] = value
    return config


class TestCommand:
    def test_quickstart_is_named_plainly(self):
        command = reproducing_command(quickstart.get_config(), "runs/quickstart")
        assert command.splitlines() == [
            "python -m train --config=configs/quickstart.py --workdir=runs/quickstart",
            "python -m train.evaluate --workdir=runs/quickstart",
        ]

    @pytest.mark.parametrize(
        "config",
        [
            *map(config_of, ("cub_resnet50", "textures", "baselines.icasc", "smoke")),
            changed_config(
                "quickstart",
                guided__mu=4.5,
                phases=("plain", "guided"),
                seed=7,
                test_split="validation",
                guided__guidance__gate="all of them; $HOME 'x'",
                guided__only_right=False,
                image_mean=(0.1, 0.2, 0.3),
            ),
            changed_config("poster", optimizer__weight_decay=1e-5, model="vgg16"),
        ],
        ids=range(6),
    )
    @pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
    def test_parsed_back_it_is_the_same_configuration(self, config):
        folder = "runs/it's a $(run)"
        found, workdir = parsed(reproducing_command(config, folder))
        assert json.loads(found.to_json()) == json.loads(config.to_json())
        assert workdir == folder

    def test_fields_of_no_file_make_a_file_of_their_own(self, tmp_path):
        config = quickstart.get_config()
        with config.unlocked():
            config.guided.novelty = (1, (2.0, "x"))
        first, command, *rest = reproducing_command(config, tmp_path).splitlines()[1:]
        assert (
            first == f"python -m train.configuration {tmp_path}/config.json > config.py"
        )
        assert command == f"python -m train --config=config.py --workdir={tmp_path}"
        (tmp_path / "config.json").write_text(config.to_json())
        done = subprocess.run(
            [sys.executable, "-m", "train.configuration", tmp_path / "config.json"],
            capture_output=True,
            text=True,
            check=True,
        )
        module = {}
        exec(done.stdout, module)
        made = module["get_config"]()
        assert made.guided.novelty == (1, (2.0, "x"))
        assert json.loads(made.to_json()) == json.loads(config.to_json())


class TestOverlay:
    def test_heat_lies_where_the_map_is(self):
        image = np.full((24, 24, 3), 100, np.uint8)
        heat = np.zeros((24, 24))
        heat[6:10, 14:18] = 1.0
        change = np.abs(
            figures.overlay(image, heat).astype(int)
            - figures.overlay(image, 0.0 * heat).astype(int)
        ).sum(axis=-1)
        peak = np.unravel_index(change.argmax(), change.shape)
        assert 36 <= peak[0] < 60 and 84 <= peak[1] < 108  # six times as large

    def test_box_is_drawn_around_the_object(self):
        image = np.zeros((24, 24, 3), np.uint8)
        picture = figures.overlay(image, None, bbox=(0.25, 0.5, 0.75, 1.0))
        rows, columns = np.nonzero(picture.sum(axis=-1))
        assert (rows.min(), rows.max()) == (36, 107)
        assert (columns.min(), columns.max()) == (72, 143)

    def test_large_images_shrink(self):
        image = np.zeros((300, 600, 3), np.uint8)
        assert figures.overlay(image, np.zeros((300, 600))).shape == (144, 288, 3)


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium, chromedriver")
class TestBrowser:
    @pytest.fixture
    def browser(self, page, tmp_path):
        webdriver = pytest.importorskip("selenium.webdriver")
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            "--headless=new",
            "--disable-dev-shm-usage",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path}",
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        driver.get(page.as_uri())
        yield driver
        messages = driver.get_log("browser")
        driver.quit()
        assert messages == []

    def test_a_heading_sorts_its_column_both_ways(self, browser):
        heads = browser.find_elements("css selector", "#methods thead button")
        column = 2  # AD

        def values():
            cells = browser.find_elements(
                "css selector", f"#methods tbody td:nth-child({column + 1})"
            )
            return [float(cell.get_attribute("data-value")) for cell in cells]

        before = values()
        heads[column].click()
        assert values() == sorted(before)
        heads[column].click()
        assert values() == sorted(before, reverse=True)
        heads[0].click()  # by name: the numbers move along
        assert sorted(values()) == sorted(before)

    def test_gallery_filters_and_sorts(self, browser, evaluated):
        run, _, _, per_example = evaluated
        fixed = (per_example["plain/accuracy"] == 0) & (
            per_example["guided/accuracy"] == 1
        )

        def cards():
            return browser.find_elements("css selector", ".card")

        assert len(cards()) == 11
        worst = int(per_example["guided/probability"].argmin())
        assert f"#{worst}" in cards()[0].text
        choose = (
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('change'))"
        )
        element = browser.find_element("id", "order")
        browser.execute_script(choose, element, "moved")
        moved = np.abs(per_example["guided/box_share"] - per_example["plain/box_share"])
        assert f"#{int(moved.argmax())}" in cards()[0].text
        element = browser.find_element("id", "filter")
        browser.execute_script(choose, element, "fixed")
        assert len(cards()) == fixed.sum()
        browser.execute_script(choose, element, "changed")
        answers = [per_example[f"{p}/predicted"] for p in ("plain", "guided")]
        assert len(cards()) == (answers[0] != answers[1]).sum()
        browser.execute_script(choose, element, "all")
        labels = per_example["guided/label"]
        element = browser.find_element("id", "class")
        browser.execute_script(choose, element, str(int(labels[0])))
        assert len(cards()) == (labels == labels[0]).sum()
        wanted = run.data.class_names[int(labels[0])]
        assert all(wanted in card.text for card in cards())

    def test_the_slider_moves_the_line(self, browser):
        browser.execute_script(
            "const s=document.getElementById('slider');s.value=100;"
            "s.dispatchEvent(new Event('input'))"
        )
        cut = "return getComputedStyle(document.querySelector('.stack'))"
        cut += ".getPropertyValue('--cut')"
        assert browser.execute_script(cut) == "0%"  # all of it is after

    @pytest.mark.parametrize("width", [400, 1280])
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_fits_phone_and_desk_in_light_and_dark(self, browser, width, scheme):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 600),
        )
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            dict(features=[dict(name="prefers-color-scheme", value=scheme)]),
        )
        overflow = "return document.documentElement.scrollWidth - window.innerWidth"
        assert browser.execute_script(overflow) <= 0
        background = browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor"
        )
        level = int(re.search(r"\d+", background)[0])
        assert level < 60 if scheme == "dark" else level > 200
