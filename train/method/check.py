"""What a configuration may say."""

import math

import jax
import optax
from ml_collections import ConfigDict

from ibsgl_jax import models
from train.data import transforms
from train.data.decoded import FITS
from train.data.faults import shown
from train.errors import ConfigError
from train.method.build import (
    LAYERS,
    METHODS,
    candidates,
    make_model,
    make_penalty,
)
from train.method.guided import ROUTES, guidance_config
from train.method.state import create_state, state_options
from train.method.teacher import METHODS as TEACHER_METHODS
from train.method.teacher import TEACHERS

LARGEST = 1e10  # of any number
INITS = ("random", "pretrained")
DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adam", "sgd")

# Numbers: (field, least value, whether it may be the least, bound or None).
_RANGES = (
    ("seed", 0, True, 2**32),
    ("image_size", 1, True, 2**16),
    ("batch_size", 1, True, None),
    ("accumulate_steps", 1, True, None),
    ("class_weights", 0, True, None),
    ("label_smoothing", 0, True, 1),
    ("mixup", 0, True, None),
    ("ema_decay", 0, True, 1),
    ("log_every", 1, True, None),
    ("save_epochs", 0, False, None),
    ("num_threads", 0, True, 1025),
    ("num_workers", 0, True, 1025),
    ("matched_area", 0, False, 1),
    ("picture_rows", 1, True, None),
    ("optimizer.weight_decay", 0, True, None),
    ("optimizer.momentum", 0, True, 1),
    ("optimizer.max_grad_norm", 0, True, None),
)
_PHASE_RANGES = (
    ("num_epochs", 0, False, None),
    ("learning_rate", 0, False, None),
    ("warmup_epochs", 0, True, None),
)
_GUIDED_RANGES = (
    ("mu", 0, True, None),
    ("mu_warmup_epochs", 0, True, None),
    ("every", 1, True, None),
    ("release", 0, True, 1),
    ("stats_decay", 0, True, 1),
    ("teacher_power", 0, False, None),
)


def check_config(config):
    """Raise ConfigError for values that cannot work, before anything is written."""
    _check_ranges(config, _RANGES)
    _check_sizes(config)
    _check_images(config)
    shares = jax.device_count() * config.accumulate_steps
    if config.batch_size % shares:
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by the "
            f"{jax.device_count()} devices"
            + (
                f" times accumulate_steps={config.accumulate_steps}"
                if config.accumulate_steps > 1
                else ""
            )
            + "; change --config.batch_size"
        )
    for field, choices in (
        ("model", models.MODELS),
        ("dtype", DTYPES),
        ("fit", FITS),
        ("augment", transforms.AUGMENTATIONS),
        ("eval_transform", transforms.EVAL_TRANSFORMS),
        ("optimizer.name", OPTIMIZERS),
    ):
        _check_choice(config, field, choices)
    if not config.phases:
        raise ConfigError("phases is empty: there is nothing to train")
    done = []
    for name in config.phases:
        if name not in config:
            raise ConfigError(f"phase {name!r} has no section of its own in the config")
        _check_phase(config, name, done)
        done.append(name)


def _check_sizes(config, prefix=""):
    """ConfigError for a number, at any depth, that nothing is measured in."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _check_sizes(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not abs(value) < LARGEST:
            raise ConfigError(f"{prefix}{name}={value}: must be below {LARGEST:.0e}")


def _check_images(config):
    for name, low in (("image_mean", -math.inf), ("image_std", 0)):
        values = config[name]
        are_numbers = all(isinstance(v, int | float) for v in values)
        if len(values) != 3 or not are_numbers or not all(low < v for v in values):
            rule = "positive numbers" if low == 0 else "numbers"
            raise ConfigError(f"{name}={tuple(values)}: must be three {rule}")
    if not str(config.data_dir).strip() or "\0" in str(config.data_dir):
        raise ConfigError(f"data_dir={config.data_dir!r}: must be a folder's name")


def _check_phase(config, name, done):
    phase = config[name]
    _check_choice(phase, "method", METHODS, name)
    if phase.init not in (*INITS, "best", *done):
        raise ConfigError(
            f"{name}.init={phase.init!r}: 'random', 'pretrained', 'best', or an "
            f"earlier phase of {done}"
        )
    if phase.init == "best" and not candidates(config, name):
        raise ConfigError(
            f"{name}.init='best': no earlier phase is plain and starts from another"
        )
    _check_choice(phase, "layers", LAYERS, name)
    if phase.layers == "head" and phase.method != "plain":
        raise ConfigError(
            f"{name}.layers='head': guidance moves the features; choose 'all', or "
            "method='plain'"
        )
    _check_ranges(phase, _PHASE_RANGES, name)
    if phase.warmup_epochs >= phase.num_epochs:
        raise ConfigError(
            f"{name}.warmup_epochs={phase.warmup_epochs}: must be less than "
            f"num_epochs={phase.num_epochs}"
        )
    if phase.method == "guided":
        _check_ranges(phase, _GUIDED_RANGES, name)
        # A frozen teacher goes by the name of its phase.
        named = [teacher for teacher in TEACHERS if teacher != "frozen"]
        if phase.teacher not in (*named, *done):
            raise ConfigError(
                f"{name}.teacher={phase.teacher!r}: one of {', '.join(named)}, or "
                f"an earlier phase of {done}"
            )
        _check_choice(phase, "route", ROUTES, name)
        _check_choice(phase, "teacher_method", TEACHER_METHODS, name)
        if phase.teacher == "average" and not config.ema_decay:
            raise ConfigError(
                f"{name}.teacher='average' needs a moving average; set ema_decay"
            )
        try:
            guidance_config(phase)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{name}: {shown(error)}") from error
        _check_layer(config, phase, name)
    else:
        try:
            make_penalty(config, phase, 1, make_model(config, num_classes=2))
        except ValueError as error:
            raise ConfigError(f"{name}.{error}") from error


def _check_layer(config, phase, name):
    """That the teacher's layer is one of the model's; no array is made for it."""
    options = state_options(config, phase)
    if not options["layer"]:
        return
    model = make_model(config, num_classes=2)
    try:
        jax.eval_shape(
            lambda: create_state(jax.random.key(0), model, optax.identity(), **options)
        )
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{name}.teacher_layer={options['layer']!r}: {reason}"
        ) from error


def _field(config, path):
    for name in path.split("."):
        if name not in config:
            raise ConfigError(f"the config has no field {path}")
        config = config[name]
    return config


def _check_choice(config, field, choices, prefix=""):
    value = _field(config, field)
    if value not in choices:
        field = f"{prefix}.{field}" if prefix else field
        raise ConfigError(f"{field}={value!r}: choose one of {', '.join(choices)}")


def _check_ranges(config, ranges, prefix=""):
    for field, low, may_be_low, high in ranges:
        value = _field(config, field)
        if not isinstance(value, int | float):
            raise ConfigError(f"{field}={value!r}: must be a number")
        if (value > low or (may_be_low and value == low)) and (
            high is None or value < high
        ):
            continue
        field = f"{prefix}.{field}" if prefix else field
        if high is not None:
            rule = f"must be at least {low} and less than {high}"
        elif low > 0:
            rule = f"must be at least {low}"
        else:
            rule = "must not be negative" if may_be_low else "must be positive"
        raise ConfigError(f"{field}={value}: {rule}")
