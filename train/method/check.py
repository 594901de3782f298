"""What a configuration may say."""

import math

import jax
import optax
from ml_collections import ConfigDict

from ibsgl_jax.images import FITS
from ibsgl_jax.predictions import LINKS
from train.data import transforms
from train.data.faults import shown
from train.errors import ConfigError, Faults
from train.method.build import (
    LAYERS,
    METHODS,
    OF_SEVERAL_LABELS,
    candidates,
    make_model,
    make_penalty,
)
from train.method.guided import ROUTES, guidance_config
from train.method.state import FINER, create_state, state_options
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
    """Raise ConfigError for values that cannot work, before anything is written.

    Raises:
      ConfigError: the one that there is; a FaultsError of all of them.
    """
    faults = Faults()
    with faults.gather():
        find_faults(config, faults)
    faults.stop()


def find_faults(config, faults: Faults):
    """Add what cannot work in a configuration, field by field."""
    _check_ranges(config, _RANGES, faults)
    _check_sizes(config, faults)
    _check_images(config, faults)
    for field, choices in (
        ("dtype", DTYPES),
        ("fit", FITS),
        ("link", LINKS),
        ("augment", transforms.AUGMENTATIONS),
        ("eval_transform", transforms.EVAL_TRANSFORMS),
        ("optimizer.name", OPTIMIZERS),
    ):
        _check_choice(config, field, choices, faults)
    _check_shares(config, faults)
    _check_link(config, faults)
    _check_model(config, faults)
    if not config.phases:
        faults.add("phases", " is empty: there is nothing to train")
    done = []
    for name in config.phases:
        if name in TEACHERS:
            faults.add(
                f"phase {name!r}",
                " is called what a teacher is, so that teacher= could mean either; "
                "give it another name",
            )
        elif name in config:
            _check_phase(config, name, done, faults)
        else:
            faults.add(f"phase {name!r}", " has no section of its own in the config")
        done.append(name)


def _check_shares(config, faults):
    if faults.has("batch_size", "accumulate_steps"):
        return
    parts = config.accumulate_steps
    if config.batch_size % (jax.device_count() * parts):
        faults.add(
            "batch_size",
            f"={config.batch_size} is not divisible by the {jax.device_count()} devices"
            + (f" times accumulate_steps={parts}" if parts > 1 else "")
            + "; change --config.batch_size, or the number of devices",
        )


def _check_link(config, faults):
    """What knows one label per image only."""
    if config.link != "sigmoid":
        return
    told = " knows one label per image; --config.link=sigmoid has several"
    for field in ("label_smoothing", "class_weights"):
        if config[field]:
            faults.add(field, f"={config[field]}:{told}; leave it at 0")
    for name in config.phases:
        if name not in config or config[name].method not in METHODS:
            continue
        phase = config[name]
        if phase.method not in OF_SEVERAL_LABELS:
            faults.add(f"{name}.method", f"={phase.method!r}{told}; choose 'guided'")
        if phase.get("teacher") == "mask":
            faults.add(f"{name}.teacher", f"='mask'{told}; choose another teacher")
        if phase.get("mask_first"):
            faults.add(f"{name}.mask_first", f"=True{told}; leave it out")


def _check_model(config, faults):
    if faults.has("dtype"):
        return
    try:
        make_model(config, num_classes=2)
    except ConfigError as error:
        faults.add("model", str(error).removeprefix("model"))


def _check_sizes(config, faults, prefix=""):
    """A number, at any depth, that nothing is measured in."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _check_sizes(value, faults, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not abs(value) < LARGEST:
            faults.add(f"{prefix}{name}", f"={value}: must be below {LARGEST:.0e}")


def _check_images(config, faults):
    for name, low in (("image_mean", -math.inf), ("image_std", 0)):
        values = config[name]
        are_numbers = all(isinstance(v, int | float) for v in values)
        if len(values) != 3 or not are_numbers or not all(low < v for v in values):
            rule = "positive numbers" if low == 0 else "numbers"
            faults.add(name, f"={tuple(values)}: must be three {rule}")
    if not str(config.data_dir).strip() or "\0" in str(config.data_dir):
        faults.add("data_dir", f"={config.data_dir!r}: must be a folder's name")


def _check_phase(config, name, done, faults):
    phase = config[name]
    _check_choice(phase, "method", METHODS, faults, name)
    if phase.init not in (*INITS, "best", *done):
        faults.add(
            f"{name}.init",
            f"={phase.init!r}: 'random', 'pretrained', 'best', or an earlier phase of "
            f"{done}",
        )
    if phase.init == "best" and not candidates(config, name):
        faults.add(
            f"{name}.init",
            "='best': no earlier phase is plain and starts from another",
        )
    _check_choice(phase, "layers", LAYERS, faults, name)
    if phase.layers == "head" and phase.method != "plain":
        faults.add(
            f"{name}.layers",
            "='head': guidance moves the features; choose 'all', or method='plain'",
        )
    _check_ranges(phase, _PHASE_RANGES, faults, name)
    share = phase.get("mask_share", 1.0)
    if not 0 <= share <= 1:
        faults.add(f"{name}.mask_share", f"={share}: give a share in [0, 1]")
    times = f"{name}.num_epochs", f"{name}.warmup_epochs"
    if not faults.has(*times) and phase.warmup_epochs >= phase.num_epochs:
        faults.add(
            times[1],
            f"={phase.warmup_epochs}: must be less than num_epochs={phase.num_epochs}",
        )
    if phase.method == "guided":
        _check_guided(config, name, done, faults)
    elif not faults.has("model", "dtype", *(f"{name}.{field}" for field in phase)):
        try:
            make_penalty(config, phase, 1, make_model(config, num_classes=2))
        except ValueError as error:
            field, equals, text = str(error).partition("=")
            faults.add(f"{name}.{field}", equals + text)


def _check_guided(config, name, done, faults):
    phase = config[name]
    _check_ranges(phase, _GUIDED_RANGES, faults, name)
    # A frozen teacher goes by the name of its phase.
    named = [teacher for teacher in TEACHERS if teacher != "frozen"]
    if phase.teacher not in (*named, *done):
        faults.add(
            f"{name}.teacher",
            f"={phase.teacher!r}: one of {', '.join(named)}, or an earlier phase of "
            f"{done}",
        )
    _check_choice(phase, "route", ROUTES, faults, name)
    _check_choice(phase, "teacher_method", TEACHER_METHODS, faults, name)
    if phase.teacher == "average" and not config.ema_decay:
        faults.add(
            f"{name}.teacher", "='average' needs a moving average; set ema_decay"
        )
    fields = [
        f"{name}.{part}.{f}" for part in ("guidance", "bottleneck") for f in phase[part]
    ]
    if not faults.has(*fields, "link"):
        known = not faults.has("model", "dtype")  # the options are checked without, too
        try:
            model = make_model(config, num_classes=2) if known else None
            guidance_config(phase, model, config.link)
        except (ValueError, TypeError) as error:
            faults.add(name, f": {shown(error)}")
    if not faults.has("model", "dtype", "image_size"):
        _check_layer(config, phase, name, faults)


def _check_layer(config, phase, name, faults):
    """That the teacher's layer is one of the model's; no array is made for it."""
    options = state_options(config, phase)
    if options["layer"] in ("", FINER):  # which every model has
        return
    model = make_model(config, num_classes=2)
    try:
        jax.eval_shape(
            lambda: create_state(jax.random.key(0), model, optax.identity(), **options)
        )
    except ValueError as error:
        reason = str(error).splitlines()[0]
        faults.add(f"{name}.teacher_layer", f"={options['layer']!r}: {reason}")


def _find(config, path, faults, prefix):
    """A field's full name and its value; None, and a fault, if there is no such one."""
    field = f"{prefix}.{path}" if prefix else path
    for name in path.split("."):
        if name not in config:
            faults.add(
                field, ": there is no such field; begin with default.get_config()"
            )
            return field, None
        config = config[name]
    return field, config


def _check_choice(config, field, choices, faults, prefix=""):
    field, value = _find(config, field, faults, prefix)
    if value is not None and value not in choices:
        faults.add(field, f"={value!r}: choose one of {', '.join(choices)}")


def _check_ranges(config, ranges, faults, prefix=""):
    for field, low, may_be_low, high in ranges:
        field, value = _find(config, field, faults, prefix)
        if value is None:
            continue
        if not isinstance(value, int | float):
            faults.add(field, f"={value!r}: must be a number")
            continue
        if (value > low or (may_be_low and value == low)) and (
            high is None or value < high
        ):
            continue
        if high is not None:
            rule = f"must be at least {low} and less than {high}"
        elif low > 0:
            rule = f"must be at least {low}"
        else:
            rule = "must not be negative" if may_be_low else "must be positive"
        faults.add(field, f"={value}: {rule}")
