"""A whole run: what it writes, and that stopping and going on changes no bit of it."""

import contextlib
import gc
import json
import logging
import os
import resource
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import trained
from tests import tiny_run
from train import devices
from train.data import dataset
from train.data.batches import iterate
from train.errors import CheckpointError, ConfigError, DiskError
from train.method.build import make_step
from train.run import checkpoint, loop, watch
from train.run.stop import Stopped


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def counting_compilations(caplog):
    """Yields a list that afterwards holds an entry per compiled training step."""
    found = []
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        yield found
    for record in caplog.records:
        message = record.getMessage()
        # pmap names them all alike. Only a training step takes images and, with
        # Adam's moments, three arrays a parameter.
        arguments = message.split("Argument mapping")[0]
        is_step = "uint8[" in arguments and arguments.count("ShapedArray") > 40
        if message.startswith("Compiling") and is_step:
            found.append(message)
    caplog.clear()


@contextlib.contextmanager
def interrupted(monkeypatch, at_batch, action):
    """Calls action() before the training loop takes the step of the n-th batch."""
    asked = at_batch + devices.AHEAD

    def counted(dataset, *, start_step=0, **options):
        is_training = "num_threads" in options
        for i, batch in enumerate(iterate(dataset, start_step=start_step, **options)):
            if is_training and start_step + i + 1 == asked:
                action()
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(loop, "iterate", counted)
        yield


@pytest.fixture(scope="module")
def whole(photo_digits_dir, tmp_path_factory):
    """An uninterrupted guided run of 8 steps: its folder and its outcome."""
    workdir = tmp_path_factory.mktemp("whole")
    config = tiny_run.make_guided_config(photo_digits_dir)
    return workdir, loop.train_and_evaluate(config, workdir)


def assert_same_run(workdir, outcome, whole):
    """Bitwise the parameters, the statistics, the optimizer and the metrics file."""
    state, other = outcome["guided"][0], whole[1]["guided"][0]
    assert int(state.step) == int(other.step) == 8
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(other))
    for name in ("metrics.jsonl", "results.json"):
        assert (workdir / name).read_bytes() == (whole[0] / name).read_bytes()


class TestTrainAndEvaluate:
    def test_runs_all_phases_and_compiles_each_once(
        self, photo_digits_dir, tmp_path, caplog
    ):
        config = tiny_run.make_config(photo_digits_dir)
        config.tensorboard = True
        config.picture_phases = ("plain", "guided")
        config.picture_rows = 2
        config.guided.teacher_layer = "bn1"
        with counting_compilations(caplog) as compiled:
            outcome = loop.train_and_evaluate(config, tmp_path)
        assert list(outcome) == ["plain", "control", "guided"]
        assert [int(state.step) for state, _ in outcome.values()] == [8, 4, 4]
        assert len(compiled) == 3

        for name in (
            "config.json",
            "results.json",
            "before_after.png",
            "models/guided.npz",
        ):
            assert (tmp_path / name).stat().st_size > 0
        assert list((tmp_path / "tensorboard" / "guided").iterdir())
        assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 16
        results = json.loads((tmp_path / "results.json").read_text())
        assert set(results["phases"]) == {"plain", "control", "guided"}
        assert 0 <= results["phases"]["guided"]["box_share"] <= 1

        # What explains the models later: the features before the head, of all images.
        for phase in outcome:
            stats = trained.load(tmp_path / "models" / f"{phase}.npz").stats
            assert float(stats.count) == 64 and stats.mean.shape == (8, 8, 8)
        # What the guided phase was taught by.
        assert outcome["guided"][0].feature_stats.mean.shape == (16, 16, 8)

        lines = read_lines(tmp_path / "metrics.jsonl")
        keys = [(x["phase"], x["split"], x["step"]) for x in lines]
        assert keys == [
            ("plain", "train", 3),
            ("plain", "validation", 4),
            ("plain", "train", 6),
            ("plain", "train", 8),
            ("plain", "validation", 8),
            ("control", "train", 3),
            ("control", "train", 4),
            ("control", "validation", 4),
            ("guided", "train", 3),
            ("guided", "train", 4),
            ("guided", "validation", 4),
        ]
        # The last step is released, so the line before has the divergence.
        assert "kl" not in lines[-2]
        guided = lines[-3]
        assert guided["kl"] > 0 and guided["gradient_norm"] > 0
        assert guided["loss"] > guided["task_loss"]
        speeds = read_lines(tmp_path / "timing.jsonl")
        assert all(line["images_per_second"] > 0 for line in speeds)

    def test_a_finished_run_is_only_evaluated_again(
        self, whole, photo_digits_dir, caplog
    ):
        workdir, outcome = whole
        before = (workdir / "metrics.jsonl").read_bytes()
        config = tiny_run.make_guided_config(photo_digits_dir)
        with counting_compilations(caplog) as compiled:
            again = loop.train_and_evaluate(config, workdir)
        assert not compiled
        assert (workdir / "metrics.jsonl").read_bytes() == before
        assert again["guided"][1] == outcome["guided"][1]


class TestResume:
    # Step 5 lies between two checkpoints and inside a log interval; step 4 is a save.
    @pytest.mark.parametrize("step", [4, 5])
    def test_after_sigterm_is_bitwise_the_whole_run(
        self, step, whole, photo_digits_dir, tmp_path, monkeypatch
    ):
        config = tiny_run.make_guided_config(photo_digits_dir)
        action = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        handler = signal.getsignal(signal.SIGTERM)
        with interrupted(monkeypatch, step, action), pytest.raises(Stopped):
            loop.train_and_evaluate(config, tmp_path)
        assert signal.getsignal(signal.SIGTERM) == handler
        assert (tmp_path / "checkpoints" / "guided" / str(step)).is_dir()
        outcome = loop.train_and_evaluate(config, tmp_path)
        assert_same_run(tmp_path, outcome, whole)

    def test_after_a_crash_is_bitwise_the_whole_run(
        self, whole, photo_digits_dir, tmp_path, monkeypatch
    ):
        config = tiny_run.make_guided_config(photo_digits_dir)

        def crash():
            raise RuntimeError("injected")

        with (
            interrupted(monkeypatch, 7, crash),
            pytest.raises(RuntimeError, match="injected"),
        ):
            loop.train_and_evaluate(config, tmp_path)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"phase": "gui')  # the line that a kill cut short
        outcome = loop.train_and_evaluate(config, tmp_path)
        assert_same_run(tmp_path, outcome, whole)

    def test_passes_over_a_damaged_checkpoint(
        self, whole, photo_digits_dir, tmp_path, monkeypatch, caplog
    ):
        config = tiny_run.make_guided_config(photo_digits_dir)
        action = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        with interrupted(monkeypatch, 6, action), pytest.raises(Stopped):
            loop.train_and_evaluate(config, tmp_path)
        newest = tmp_path / "checkpoints" / "guided" / "6"
        for path in newest.rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:-20])
        with caplog.at_level(logging.WARNING, logger="train"):
            outcome = loop.train_and_evaluate(config, tmp_path)
        assert f"checkpoint {newest} is damaged" in caplog.text
        assert_same_run(tmp_path, outcome, whole)

    def test_refuses_to_start_over_when_all_are_damaged(
        self, whole, photo_digits_dir, tmp_path, monkeypatch
    ):
        config = tiny_run.make_guided_config(photo_digits_dir)
        action = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        with interrupted(monkeypatch, 2, action), pytest.raises(Stopped):
            loop.train_and_evaluate(config, tmp_path)
        folder = tmp_path / "checkpoints" / "guided"
        for path in folder.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
        with pytest.raises(CheckpointError) as info:
            loop.train_and_evaluate(config, tmp_path)
        assert "\n" not in str(info.value) and str(folder) in str(info.value)


class TestNonFinite:
    def run(self, config, workdir, monkeypatch, *, at_step):
        """The run with one parameter broken after the given step."""

        def breaking(*arguments, **options):
            step_fn = make_step(*arguments, **options)

            def step(state, batch, **options):
                after, sums = step_fn(state, batch, **options)
                is_now = after.step == at_step
                kernel = after.params["fc"]["kernel"]
                after.params["fc"]["kernel"] = jnp.where(is_now, jnp.nan, kernel)
                return after, sums

            return step

        with monkeypatch.context() as patch:
            patch.setattr(loop, "make_step", breaking)
            loop.train_and_evaluate(config, workdir)

    def test_names_step_term_and_checkpoint(
        self, photo_digits_dir, tmp_path, monkeypatch
    ):
        config = tiny_run.make_guided_config(photo_digits_dir)
        with pytest.raises(watch.NonFiniteError) as info:
            self.run(config, tmp_path, monkeypatch, at_step=5)
        good = tmp_path / "checkpoints" / "guided" / "4"
        assert str(info.value) == (
            f"task_loss is nan at step 6 of phase guided; last good checkpoint: {good}"
        )
        assert good.is_dir() and len(list(good.parent.iterdir())) == 1


class TestWindow:
    def test_names_the_cause_rather_than_its_effects(self):
        bad = {"loss": (np.nan, 1.0), "kl": (np.inf, 1.0), "gradient_norm": (0.0, 1.0)}
        with pytest.raises(watch.NonFiniteError, match="^kl is inf here$"):
            watch.Window().add(bad, where="here")

    def test_leaves_out_what_was_never_counted(self):
        window = watch.Window({"loss": [2.0, 4.0]})
        window.add({"loss": (1.0, 2.0), "kl": (0.0, 0.0)}, where="here")
        assert window.means() == {"loss": 0.5}


class TestOptions:
    @pytest.mark.slow
    def test_average_and_trace(self, whole, photo_digits_dir, tmp_path, monkeypatch):
        """With a moving average a stopped run goes on exactly; a trace is written."""
        config = tiny_run.make_guided_config(photo_digits_dir)
        config.ema_decay = 0.9
        action = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        with interrupted(monkeypatch, 5, action), pytest.raises(Stopped):
            loop.train_and_evaluate(config, tmp_path / "stopped")
        runs = {}
        for name in ("stopped", "straight"):
            outcome = loop.train_and_evaluate(config, tmp_path / name, profile=(6, 7))
            runs[name] = jax.device_get(outcome["guided"][0])
        chex.assert_trees_all_equal(runs["stopped"], runs["straight"])
        state = runs["straight"]
        # The average follows the parameters, which do not know of it; another program
        # without it, so they may round in another order.
        chex.assert_trees_all_close(
            state.params,
            jax.device_get(whole[1]["guided"][0].params),
            rtol=1e-4,
            atol=1e-7,
        )
        kernel, average = (p["fc"]["kernel"] for p in (state.params, state.ema_params))
        distance = np.linalg.norm(kernel - average) / np.linalg.norm(kernel)
        assert 1e-4 < distance < 0.5
        assert state.variables["params"] is state.ema_params
        traces = (tmp_path / "straight" / "profile" / "guided").rglob("*.xplane.pb")
        assert list(traces)


class TestDiskFull:
    # The coroutines that orbax leaves behind complain when they are collected.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_stops_in_one_line_and_goes_on_later(
        self, whole, photo_digits_dir, tmp_path, monkeypatch
    ):
        config = tiny_run.make_guided_config(photo_digits_dir)
        save = checkpoint.save

        def save_less(manager, state, **options):
            if int(jax.device_get(state.step)) == 8:
                manager.wait_until_finished()
                # Every file from here on is cut short, as on a full disk.
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
            save(manager, state, **options)

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", save_less)
            try:
                with pytest.raises(ValueError) as info:
                    loop.train_and_evaluate(config, tmp_path)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert isinstance(info.value, (CheckpointError, DiskError))
        assert "\n" not in str(info.value) and "make room" in str(info.value)
        gc.collect()
        assert (tmp_path / "checkpoints" / "guided" / "4").is_dir()
        outcome = loop.train_and_evaluate(config, tmp_path)
        assert_same_run(tmp_path, outcome, whole)


class TestData:
    """What only the data can tell, in one line."""

    @pytest.mark.parametrize(
        "change, word",
        [
            ({"model": "vgg16", "image_size": 8}, "not 8 x 8"),
            ({"train_split": "trian"}, "no split 'trian'"),
            ({"batch_size": 128}, "batch_size=128 is more than the 64 examples"),
            ({"model_options.stage_sise": 3}, "model_options of small_resnet"),
            ({"guided.init": "pretrained", "pretrained": "no.pth"}, "no.pth"),
        ],
    )
    def test_refuses_in_one_line(self, change, word, photo_digits_dir, tmp_path):
        config = tiny_run.make_guided_config(photo_digits_dir)
        with config.unlocked():
            if "model" in change:
                config.model_options = {}
            config.update_from_flattened_dict(change)
        with pytest.raises(ValueError) as info:
            loop.train_and_evaluate(config, tmp_path)
        assert type(info.value) is not ValueError
        assert word in str(info.value) and "\n" not in str(info.value)


class TestCheckConfig:
    @pytest.mark.parametrize(
        "change, word",
        [
            (
                {"batch_size": 12},
                "batch_size=12 is not divisible by the 8 devices; change "
                "--config.batch_size, or the number of devices",
            ),
            ({"model": "resnet5"}, "model='resnet5'"),
            ({"guided.mu": -1.0}, "guided.mu=-1"),
            ({"accumulate_steps": 4}, "times accumulate_steps=4"),
            ({"label_smoothing": 1.5}, "label_smoothing=1.5: must be at least 0"),
            ({"optimizer.name": "lion"}, "optimizer.name='lion'"),
            ({"optimizer.weight_decay": -0.1}, "optimizer.weight_decay=-0.1"),
            ({"augment": "fancy"}, "augment='fancy'"),
            ({"dtype": "float16"}, "dtype='float16'"),
            ({"log_every": 0}, "log_every=0"),
            ({"guided.warmup_epochs": 9.0}, "guided.warmup_epochs=9.0"),
            ({"guided.stats_decay": 1.0}, "guided.stats_decay=1.0"),
            ({"guided.init": "plain"}, "guided.init='plain'"),
            ({"guided.method": "magic"}, "guided.method='magic'"),
            ({"guided.num_epochs": 0.0}, "guided.num_epochs=0"),
            ({"guided.guidance.gate": "open"}, "gate='open'"),
            ({"guided.bottleneck.beta": -1.0}, "beta=-1"),
            ({"guided.teacher": "magic"}, "guided.teacher='magic'"),
            ({"guided.teacher": "plain"}, "guided.teacher='plain'"),
            ({"guided.teacher": "average"}, "needs a moving average; set ema_decay"),
            (
                {"guided.teacher_layer": "layer1"},
                "guided.teacher_layer='layer1': no layer 'layer1'; nearest",
            ),
            (
                {"guided.teacher_layer": "layer1_0/conv1"},
                "guided.teacher_layer='layer1_0/conv1': layer 'layer1_0/conv1' does",
            ),
            ({"guided.route": "scenic"}, "guided.route='scenic'"),
            ({"guided.every": 0}, "guided.every=0"),
            ({"guided.release": 1.0}, "guided.release=1.0"),
            ({"phases": ("other",)}, "phase 'other'"),
            ({"phases": ()}, "phases is empty"),
        ],
    )
    def test_refuses_in_one_line_and_writes_nothing(self, change, word, tmp_path):
        config = tiny_run.make_guided_config(tmp_path / "data")
        config.update_from_flattened_dict(change)
        workdir = tmp_path / "run"
        with pytest.raises(ConfigError) as info:
            loop.train_and_evaluate(config, workdir)
        assert word in str(info.value) and "\n" not in str(info.value)
        assert not workdir.exists()


def test_replicated_state_is_a_copy():
    """Phases that start from the same weights each donate a state of their own."""
    tree = {"w": np.arange(3.0)}
    replicated = devices.replicate(tree)
    assert replicated["w"] is not tree["w"]
    assert len(replicated["w"].sharding.device_set) == 8


class TestPhaseOptions:
    @pytest.mark.slow
    def test_data_set_and_teacher_of_a_phase(self, photo_digits_dir, tmp_path):
        """A phase on data of its own, taught by an earlier phase, runs and counts."""
        config = tiny_run.make_config(photo_digits_dir, phases=("plain", "guided"))
        config.plain.num_epochs = 0.25
        config.guided.num_epochs = 0.75
        config.guided.release = 0.34
        config.guided.init = "random"
        config.guided.teacher = "plain"
        config.guided.dataset = "photo_digits/shortcut"
        result = loop.train_and_evaluate(config, tmp_path / "run")
        assert int(result["guided"][0].step) == 3
        lines = read_lines(tmp_path / "run" / "metrics.jsonl")
        guided = [d for d in lines if d["phase"] == "guided" and d["split"] == "train"]
        assert guided[-1]["kl"] > 0

    def test_own_data_set_is_what_it_learns_from(self, photo_digits_dir):
        config = tiny_run.make_config(photo_digits_dir)
        data = dataset.load_data(config)
        config.guided.dataset = "photo_digits/shortcut"
        own = dataset.train_source(config, config.guided, data)
        config.dataset = "photo_digits/shortcut"
        wanted = dataset.load_data(config).train
        images = [np.stack([s[i]["image"] for i in range(8)]) for s in (own, wanted)]
        np.testing.assert_array_equal(*images)
        config.dataset = "photo_digits/independent"
        assert dataset.train_source(config, config.plain, data) is data.train
        assert not np.array_equal(images[0][0], data.train[0]["image"])
