"""The configuration of a run of seconds: the real path on few and small things."""

import json

import jax

from configs import default, photos
from train.method.build import make_model, make_optimizer, make_schedule
from train.method.state import create_state
from train.run import checkpoint


def make_config(data_dir, *, phases=("plain", "control", "guided")):
    """16 steps: plain 8, control and guided 4 each; a checkpoint every 4."""
    config = default.get_config()
    config.data_dir = str(data_dir)
    config.dataset_options.num_train = 64
    config.dataset_options.num_validation = 24
    config.dataset_options.num_test = 24
    config.model_options.stage_sizes = (1,)
    config.model_options.stage_strides = (2,)
    config.model_options.num_filters = 8
    config.batch_size = 16
    config.phases = phases
    config.plain.num_epochs = 2.0
    config.control.num_epochs = 1.0
    config.guided.num_epochs = 1.0
    config.guided.bottleneck.num_steps = 3
    config.log_every = 3
    config.progress = False
    config.tensorboard = False
    config.picture_phases = ()
    return config.lock()


def make_photos_config():
    """configs/photos.py with a network of seconds, on pictures as they are."""
    config = photos.get_config()
    config.model = "small_resnet"
    config.model_options.stage_sizes = (1,)
    config.model_options.stage_strides = (2,)
    config.model_options.num_filters = 8
    config.augment = "shift"
    config.fit, config.eval_transform = "squash", "none"
    config.plain.warmup_epochs = 0.0
    config.plain.learning_rate = 0.01
    config.guided.num_epochs = 1.0
    config.tensorboard = config.progress = False
    config.picture_phases = ()
    return config


def make_guided_config(data_dir):
    """One guided phase of 8 steps from random weights."""
    config = make_config(data_dir, phases=("guided",))
    config.guided.init = "random"
    config.guided.num_epochs = 2.0
    return config


def save_untrained(config, workdir):
    """Write what a run leaves behind, its phases with random weights of their own."""
    tx = make_optimizer(config.optimizer, make_schedule(1.0, 2, 0))
    model = make_model(config, 10)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json())
    lines = []
    for number, phase in enumerate(config.phases):
        state = create_state(jax.random.key(number), model, tx, config.image_size)
        with checkpoint.open_manager(workdir / "checkpoints" / phase) as manager:
            checkpoint.save(manager, state, accuracy=0.1, meta={})
            manager.wait_until_finished()
        for step in (3, 6, 8):
            values = {"loss": 2.3 - step / 10, "accuracy": step / 20}
            for split in ("train", "validation"):
                line = {"phase": phase, "step": step, "split": split, **values}
                lines.append(json.dumps(line) + "\n")
    (workdir / "metrics.jsonl").write_text("".join(lines))
