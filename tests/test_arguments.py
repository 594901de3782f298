"""Absurd flags of the commands that measure: one line, status 2, nothing written."""

import pytest

from tests import tiny_run
from train import evaluate, scores, sweep, teachers
from train.data import dataset

SWEEP = "configs/sweeps/textures.py"
ABSURD = {
    evaluate.main: (
        "",
        "--workdir",
        "--workdir nope",
        "--workdir {file}",
        "--workdir W --limit 0",
        "--workdir W --limit -3",
        "--workdir W --limit 99999999999999999999",
        "--workdir W --limit many",
        "--workdir W --split dusk",
        "--workdir W --split",
        "--workdir W --phases gided",
        "--workdir W --phases",
        "--workdir W --compare nope",
        "--workdir W --compare {file}",
        "--workdir W --full=yes",
        "--workdir W --nonsense",
        "--workdir W more",
    ),
    scores.main: (
        "--workdir W",
        "--workdir nope --split test",
        "--workdir W --split dusk --num-perturbed 0",
        "--workdir W --split test --limit 0",
        "--workdir W --split test --num-perturbed -1",
        "--workdir W --split test --num-method-images 0",
        "--workdir W --split test --methods tea_leaves",
        "--workdir W --split test --phases x",
    ),
    teachers.main: (
        "--workdir nope",
        "--workdir W nope",
        "--workdir W --phase x",
        "--workdir W --split dusk",
        "--workdir W --limit 0",
        "--workdir W --steps 0",
        "--workdir W --steps many",
        "--workdir W --samples -1",
        "--workdir W --layers layer99",
    ),
    sweep.main: (
        "",
        "nope.py",
        "configs/quickstart.py",
        "README.md",
        "configs",
        SWEEP + " --seeds 0",
        SWEEP + " --jobs 0",
        SWEEP + " --jobs x",
        SWEEP + " --phases gided",
        SWEEP + " --columns beauty",
        SWEEP + " --methods hirescam --ours gided",
        SWEEP + " --folder {file}",
        SWEEP + " --folder gs://bucket/runs",
        SWEEP + " --figure nope/dots.png",
        SWEEP + " --figure dots.txt",
        SWEEP + " --limit -1",
        SWEEP + " --table --folder nope",
    ),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, photo_digits_dir):
    """A run whose phase is trained to its end."""
    workdir = tmp_path_factory.mktemp("arguments") / "tiny"
    config = tiny_run.make_config(photo_digits_dir, phases=("plain",))
    tiny_run.save_untrained(config, workdir)
    (workdir / "models").mkdir()
    for phase in config.phases:
        (workdir / "models" / f"{phase}.npz").touch()
    dataset.load_data(config)  # tells of its preparation
    return workdir


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("main", ABSURD, ids=lambda main: main.__module__)
def test_absurd_arguments_are_one_line(main, workdir, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("x")
    before = contents(workdir) | contents(tmp_path)
    for arguments in ABSURD[main]:
        words = [
            str(workdir) if word == "W" else word.format(file=file)
            for word in arguments.split()
        ]
        assert main(words) == 2, arguments
        told = capsys.readouterr()
        assert told.err.startswith("error: ") and told.err.count("\n") == 1, told.err
        assert told.out == ""
    assert contents(workdir) | contents(tmp_path) == before
