"""A finished run, read back: its configuration, model and the states of its phases."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import default
from train.data import dataset
from train.data.faults import shown
from train.errors import ConfigError
from train.method.build import make_model, make_optimizer, make_schedule
from train.method.state import create_state, state_options
from train.run import checkpoint

# What the runs of earlier versions lack; absent is off.
LATER_FIELDS = (
    "data",
    "fit",
    "class_weights",
    "teacher_method",
    "teacher_power",
    "mask_first",
    "mask_share",
    "trackers",
    "layers",
    "tap",
    "link",
    "move",
    "contrast",
)


class Run:
    """A trained run: its config, model and the states of its phases.

    Attributes:
      name, workdir, config (its phases are those chosen), model, states (dict phase ->
      TrainState), notes (what is missing, one line each).

    ``num_classes``: given, no data is opened. ``data``: the examples of a run that was
    given them from Python (see ``train_and_evaluate``).
    """

    def __init__(
        self, workdir, num_classes: int | None = None, *, phases=None, data=None
    ):
        self.workdir = Path(workdir)
        self.name = self.workdir.absolute().name
        self.config = load_config(self.workdir)
        if phases:
            self.config.phases = choose_phases(self.config, phases)
        self.data = None
        if num_classes is None:
            self.data = dataset.load_data(self.config, examples=data)
            num_classes = self.data.num_classes
        self.model, self.states, self.notes = load_states(
            self.config, num_classes, self.workdir
        )
        changes = self.data and dataset.changed_pictures(self.data, self.workdir)
        if changes:
            self.notes.append(changes)


def load_config(workdir: Path):
    """The configuration of a run.

    Raises:
      ConfigError: there is no run in the folder, or its config.json is damaged.
    """
    path = workdir / "config.json"
    try:
        config = ConfigDict(_tuples(json.loads(path.read_text())))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{workdir} holds no run (no config.json); "
            f"train one first: python -m train --workdir={workdir}"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {shown(str(error))}") from None
    fault = _fault(config)
    if fault:
        raise ConfigError(f"{path} is damaged: {shown(fault)}")
    return config


def _fault(config) -> str | None:
    """The first field that is not what every run has, in words.

    Fields that came later than the run may be absent; they are off.
    """
    phases = config.get("phases")
    if not isinstance(phases, tuple) or not phases:
        return "phases is no list of names"
    wanted = default.get_config()
    pairs = [("", config, {k: v for k, v in wanted.items() if k != "phases"})]
    for name in phases:
        if not isinstance(name, str) or not isinstance(config.get(name), ConfigDict):
            return f"phase {name!r} has no section"
        is_guided = config[name].get("method") == "guided"
        section = default.guided_phase() if is_guided else default.plain_phase()
        pairs.append((f"{name}.", config[name], dict(section.items())))
    for prefix, given, known in pairs:
        # A phase of the default's is none that the run must have.
        known = {k: v for k, v in known.items() if prefix or k not in wanted.phases}
        if fault := _field_fault(prefix, given, known):
            return fault
    return None


def _field_fault(prefix: str, given, known) -> str | None:
    """The first field of a section that is absent or of another type, in words."""
    for field, value in known.items():
        if field not in given:
            if field in LATER_FIELDS:
                continue
            return f"{prefix}{field} is missing"
        kinds = (int, float) if isinstance(value, int | float) else type(value)
        if not isinstance(given[field], kinds) and value is not None:
            return f"{prefix}{field} is {given[field]!r}"
        if isinstance(value, ConfigDict):
            fault = _field_fault(f"{prefix}{field}.", given[field], value)
            if fault:
                return fault
    return None


def choose_phases(config, names) -> tuple:
    """The phases of these names, in the order of the run.

    Raises:
      ConfigError: one of them is none of the run's.
    """
    unknown = sorted(map(str, set(names) - set(config.phases)))
    if unknown:
        known = shown(", ".join(config.phases))
        raise ConfigError(f"the run has no phase {unknown[0]!r}; it has {known}")
    return tuple(name for name in config.phases if name in names)


def _tuples(tree):
    """Lists become the tuples that they were before JSON; models must be hashable."""
    if isinstance(tree, dict):
        return {key: _tuples(branch) for key, branch in tree.items()}
    return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree


def load_states(config, num_classes: int, workdir: Path):
    """The model and the newest checkpoint of every phase.

    Returns:
      (model, dict phase -> TrainState, notes): the notes name phases without one.

    Raises:
      ConfigError: no phase has a checkpoint, or one is of another model.
      CheckpointError: a checkpoint cannot be read.
    """
    model = make_model(config, num_classes)
    tx = make_optimizer(config.optimizer, make_schedule(1.0, 2, 0))
    loaded, notes = {}, []
    for phase in config.phases:
        like = jax.eval_shape(
            functools.partial(
                create_state,
                jax.random.key(0),
                model,
                tx,
                **state_options(config, config[phase]),
            )
        )
        folder = workdir / "checkpoints" / phase
        restored = None
        if folder.is_dir():
            with checkpoint.open_manager(folder) as manager:
                _check_same_model(manager, like, workdir)
                restored = checkpoint.restore(manager, like)
        if restored is None:
            notes.append(f"phase {phase} has no checkpoint yet and is left out")
        else:
            loaded[phase] = jax.tree.map(jnp.asarray, restored[0])
    if not loaded:
        raise ConfigError(
            f"no checkpoint in {workdir}/checkpoints; "
            f"train first: python -m train --workdir={workdir}"
        )
    return model, loaded, notes


def _check_same_model(manager, like, workdir):
    """ConfigError if the newest checkpoint holds arrays of other names or shapes."""
    import orbax.checkpoint as ocp

    step = manager.latest_step()
    if step is None:
        return
    folder = Path(manager.directory) / str(step)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(folder / "state")
        saved = _shapes(metadata.item_metadata.tree)
    except Exception:  # noqa: BLE001
        return  # restoring will say what is damaged
    wanted = _shapes(like)
    different = sorted(
        name
        for name in saved.keys() | wanted.keys()
        if name.startswith(("params", "batch_stats"))
        and saved.get(name) != wanted.get(name)
    )
    if different:
        name = different[0]
        raise ConfigError(
            f"checkpoint {folder} is of another model than {workdir}/config.json "
            f"describes: {name} is {saved.get(name, 'absent')} there and "
            f"{wanted.get(name, 'absent')} here"
        )


def _shapes(tree) -> dict:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path): tuple(
            leaf.shape
        )
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def open_split(run: Run, split: str | None = None, limit: int | None = None):
    """The examples of a split of the run's data set.

    Args:
      run: with its data.
      split: of the data set; the config's test split if None.
      limit: so many at most, the first ones.

    Raises:
      ConfigError, DatasetError: no such split, or nothing in it.
    """
    source = run.data.test
    if split is not None:
        source = dataset.open_split(run.config, run.data, split)
    if len(source) == 0 or (limit is not None and limit < 1):
        raise ConfigError("there is no image to evaluate; raise --limit")
    return dataset.first_examples(source, limit)
