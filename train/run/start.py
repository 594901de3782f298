"""The state that a phase starts from: random, pretrained, or an earlier phase's."""

import json
import logging

import jax
import numpy as np
import optax

from ibsgl_jax import models, pretrained, trained
from ibsgl_jax.models import own
from train.errors import ConfigError, Faults
from train.files import write_json
from train.method.build import candidates, make_model
from train.method.state import create_state, restart, state_options

LOGGER = logging.getLogger("train")


def initial_state(config, phase, finished, model, tx):
    """The TrainState before the first step; ``finished``: dict of earlier phases'.

    Raises:
      ConfigError: the model cannot be made, or its pretrained weights do not fit.
    """
    options = state_options(config, phase)
    try:
        if phase.init in finished:
            before = finished[phase.init].variables
            # A copy: the step donates its state; other phases start from the same one.
            params, batch_stats = jax.tree.map(
                np.array, (before["params"], before["batch_stats"])
            )
            return restart(model, tx, params, batch_stats, **options)
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        # Outside pmap the axis has no name; BatchNorm asks for it only in training.
        state = create_state(key, model, tx, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(_impossible(config, error)) from error
    if phase.init == "pretrained":
        params, batch_stats, notices = _pretrained(config, state)
        for notice in notices:
            LOGGER.warning("%s", notice)
        state = restart(model, tx, params, batch_stats, **options)
    return state


def choose_start(config, plan, scores, workdir):
    """The plan with the phase that ``init = "best"`` stands for, as starts.json tells.

    Best is the lowest NLL on the validation split, which tells networks apart where a
    picture more or less decides on their accuracy; of two that are equal, the earlier.

    Args:
      scores: dict phase name -> dict accuracy, nll. Phases of an earlier version have
        no nll; then the highest accuracy is best.
    """
    if plan.phase.init != "best":
        return plan
    known = {name: scores[name] for name in candidates(config, plan.name)}
    by = "nll" if all("nll" in each for each in known.values()) else "accuracy"
    values = {name: each[by] for name, each in known.items()}
    best = (min if by == "nll" else max)(values, key=values.get)
    phase = plan.phase.copy_and_resolve_references()
    phase.init = best
    told = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    LOGGER.info("%s starts from %s (validation %s: %s)", plan.name, best, by, told)
    if jax.process_index() == 0:
        path = workdir / "starts.json"
        starts = json.loads(path.read_text()) if path.exists() else {}
        starts[plan.name] = {"init": best, "validation": known}
        write_json(path, starts)
    return plan._replace(phase=phase)


def find_faults(config, faults: Faults):
    """Add that the model cannot be made, or that weights do not fit it.

    The number of classes, which only the data tell, is that of no layer that is asked
    for here. No array is made but the weights', which are read once.
    """
    if faults.has("model", "dtype", "image_size"):
        return
    model = make_model(config, num_classes=2)
    try:
        own.check(model, config.image_size)
    except Exception as error:  # noqa: BLE001  (a model of one's own raises anything)
        reason = _impossible(config, error).removeprefix("model")
        faults.add("model", reason, of="image_size")
        return
    if any(config[name].init == "pretrained" for name in config.phases):
        key, tx = jax.random.key(0), optax.identity()
        fresh = jax.eval_shape(lambda: create_state(key, model, tx, config.image_size))
        with faults.gather():
            _pretrained(config, fresh)


def _impossible(config, error) -> str:
    reason = str(error).splitlines()[0]
    return f"model {config.model} at image_size={config.image_size}: {reason}"


def _read_weights(config) -> pretrained.Start:
    if not own.is_name(config.model):
        options = config.model_options.to_dict()
        if "image_size" in models.attributes(config.model):
            options["image_size"] = config.image_size  # positions are interpolated
        return pretrained.start(config.model, config.pretrained or None, **options)
    if not config.pretrained:
        raise ValueError(
            f"{config.model} has no weights that are known; give --config.pretrained="
            "FILE, of models/ in a run or of trained.save, or init='random'"
        )
    found = trained.load(config.pretrained)
    return pretrained.Start(found.variables, (), found.preprocessing)


def _pretrained(config, fresh):
    """Weights from a file; some layers may stay as they are.

    Those that the file declares not to hold, else one, of another number of classes.

    Returns:
      (params, batch_stats, notices): the latter are lines for who trains.
    """
    what = f"pretrained={config.pretrained!r}" if config.pretrained else "pretrained"
    try:
        start = _read_weights(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from error
    wanted = {"params": fresh.params, "batch_stats": fresh.batch_stats}
    given = dict(jax.tree_util.tree_leaves_with_path(start.variables))
    kept = []

    def choose(path, leaf):
        if path in given and given[path].shape == leaf.shape:
            return given[path]
        kept.append(jax.tree_util.keystr(path[1:], simple=True, separator="/"))
        return leaf

    variables = jax.tree_util.tree_map_with_path(choose, wanted)
    strange = [name for name in kept if name.split("/")[0] not in start.left_out]
    if len(strange) > (0 if start.left_out else 2):
        raise ConfigError(
            f"{what}: does not fit {config.model} with these model_options in "
            f"{', '.join(strange[:3])} and others"
        )
    return variables["params"], variables["batch_stats"], _notices(config, start, kept)


def _notices(config, start, kept) -> list[str]:
    notices = []
    if kept:
        notices.append(f"not from the pretrained file: {', '.join(kept)}")
    for field in ("mean", "std"):
        before = getattr(start.preprocessing, field)
        if not np.allclose(config[f"image_{field}"], before, atol=1e-3):
            numbers = ", ".join(f"{number:.4f}" for number in before)
            notices.append(f"the pretrained weights had image_{field}=({numbers})")
    return notices
