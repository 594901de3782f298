"""Every flag of every command set to something absurd: one line, status 2, no file."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import models
from ibsgl_jax.app import cli
from tests.quick_explain import save_photo, snapshot

# What nobody means, for any flag; a flag may take one of them for its own.
ABSURD = (
    "",
    "\0",
    "\n\x1b[2J",
    "-1",
    "99999999999999999999999999999999999999999999999999",
    "1e400",
    "nan",
    "/proc/self/nothing",
    "/dev/null/x",
    "x" * 5000,
    "\u00b2",
    "\udce9",
    "--",
)
# Names that are as good as any: a folder's name, a part of a class's name.
FINE = {("--out", text) for text in ("-1", "1e400", "nan", "\u00b2", "\udce9")}
FINE |= {("--out", "99999999999999999999999999999999999999999999999999")}
FINE |= {("--out", "\n\x1b[2J")}


def flags():
    """(command, flag) of all there are."""
    parser = cli._parser()
    (commands,) = (
        action
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return [
        (name, action.option_strings[0] if action.option_strings else action.dest)
        for name, command in commands.choices.items()
        for action in command._actions
        if not isinstance(action, argparse._HelpAction)
    ]


class TestEveryFlag:
    @pytest.mark.parametrize("command, flag", flags())
    def test_absurd_values(self, command, flag, tmp_path, capsys, monkeypatch):
        folder = tmp_path / "here"
        save_photo(folder / "a.png")
        monkeypatch.chdir(folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        before = snapshot(tmp_path)
        for text in ABSURD:
            if (flag, text) in FINE:
                continue
            arguments = [command]
            if command == "explain":
                arguments += ["a.png"] if flag != "photos" else ["--method=random"]
            if flag not in ("--method", "photos") and command != "models":
                arguments += ["--method=random"]
            if flag in ("--layer", "--class", "--stats"):
                arguments += ["--checkpoint", str(tiny_run(tmp_path))]
            if flag == "--stats":
                arguments[-3:-2] = ["--method=ib"]
            arguments += [f"{flag}={text}" if flag.startswith("-") else text]
            status = cli.main(arguments)
            told = capsys.readouterr()
            note = (arguments, told)
            assert status == 2, note
            assert told.out == "" and "Traceback" not in told.err, note
            lines = [s for s in told.err.splitlines() if not s.startswith("  ")]
            assert len(lines) == 1 and lines[0].startswith("ibsgl: "), note
            assert told.err.replace("\n", "").isprintable(), note
            after = snapshot(tmp_path)
            after.pop("run/models/plain.npz", None)
            assert after == before, note

    def test_flags_that_exclude_each_other(self, capsys):
        status = cli.main(["explain", "a.png", "--weights", "a", "--checkpoint", "b"])
        (line,) = capsys.readouterr().err.splitlines()
        assert status == 2 and "not allowed with" in line

    @pytest.mark.parametrize("argv", [[], ["explian"], ["explain"], ["models", "--x"]])
    def test_commands_that_are_none(self, argv, capsys):
        assert cli.main(argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def tiny_run(tmp_path):
    """A run of the trainer's smallest model, made once."""
    from ibsgl_jax import pretrained, trained

    path = tmp_path / "run" / "models" / "plain.npz"
    if not path.exists():
        model = models.create("small_resnet", num_classes=3)
        image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
        variables = jax.tree.map(
            lambda leaf: np.full(leaf.shape, 0.1, np.float32),
            jax.eval_shape(model.init, jax.random.key(0), image),
        )
        trained.save(
            path,
            variables,
            model_name="small_resnet",
            model_options={},
            num_classes=3,
            preprocessing=pretrained.Preprocessing(16, 16, (0.5,) * 3, (0.25,) * 3),
        )
    return tmp_path / "run"
