"""Whose map the saliency should follow: network, layer and method of the teacher."""

import jax
import jax.numpy as jnp

from ibsgl_jax import attribution, bottleneck, feature_stats, saliency
from train.method import answers, masks
from train.method.state import layer_name, tap

# Networks other than the one that learns: an earlier phase's, and the average's.
NETWORKS = ("frozen", "average")
CAMS = {"hirescam": attribution.hirescam, "layer_cam": attribution.layer_cam}
METHODS = ("bottleneck", *CAMS)
TEACHERS = (*METHODS, *NETWORKS, "mask")


def make_teacher(
    model,
    *,
    teacher="bottleneck",
    method="bottleneck",
    layer="",
    power=1.0,
    mask_first=False,
    config,
    decay,
    when=None,
    axis_name=None,
):
    """The map that teaches, as a function of the step's forward pass.

    Args:
      model: with features and head methods.
      teacher: one of ``TEACHERS``. A method ("bottleneck", "hirescam", "layer_cam"): of
        the network itself as it is at this step. "frozen": of
        ``Forward.teacher_variables``; "average": of the moving average of the
        parameters; both by ``method``, in evaluation mode, for one more forward pass.
        "mask": the object's true mask (an oracle), from ``Forward.batch``.
      method: of ``METHODS``, for "frozen" and "average".
      layer: whose features are explained (a name of ``tapping.layer_names``); "" for
        those before the head. Of the network itself they are ``Forward.inner``, from
        the step's own pass; another network's cost its pass up to there. Behind an
        inner layer comes the rest of the network in evaluation mode, forward and
        backward: once for a CAM, at every step and sample for the bottleneck.
      power: the map divided by its maximum is raised to it: above 1 sharpens.
      mask_first: an example that has a mask is taught by it, the others by the map.
      config: BottleneckConfig.
      decay: of the moving feature statistics, which are those of the teacher's layer.
      when: function of the step -> bool, whether this step is guided; None: always.
      axis_name: pmap axis to average statistics over; None for one device.

    Returns:
      ``teacher_fn(forward, head_fn) -> (map_fn, seen, statistics)``: the map of a
      ``parts.Part``, float32 [n, h, w] >= 0; the features it is of; theirs, moving.
    """
    if teacher in METHODS:
        method = teacher

    def teacher_fn(forward, head_fn):
        now = is_guided(when, forward)
        seen, rest_fn = _seen(model, teacher, layer, forward, head_fn, when)
        stats = forward.feature_stats
        if method == "bottleneck" or teacher == "mask":
            stats = feature_stats.update_moving(
                stats, seen, decay=decay, axis_name=axis_name
            )
        if teacher in NETWORKS:
            # Where the step is not guided, nothing was seen.
            stats = jax.tree.map(
                lambda new, old: jnp.where(now, new, old), stats, forward.feature_stats
            )

        def map_fn(part):
            if teacher == "mask":
                return part.answers["mask"].astype(jnp.float32)
            if method == "bottleneck":
                moments = feature_stats.moments(
                    stats, active_threshold=config.active_threshold
                )
                teaching = bottleneck.attribute(
                    part.keys,
                    rest_fn,
                    part.seen,
                    part.labels,
                    moments,
                    config=config,
                    loss=answers.link_of(part.answers),
                ).saliency
            else:
                teaching = CAMS[method](rest_fn, part.seen, part.labels)
            teaching = sharpened(teaching.astype(jnp.float32), power)
            return _or_mask(teaching, part.answers) if mask_first else teaching

        return map_fn, seen, stats

    return teacher_fn


def teaches_by_bottleneck(phase) -> bool:
    """Whether a guided phase of the configuration computes bottleneck maps."""
    if phase.teacher in (*CAMS, "mask"):
        return False
    own = phase.teacher == "bottleneck"
    return own or phase.get("teacher_method", "bottleneck") == "bottleneck"


def _seen(model, teacher, layer, forward, head_fn, when):
    """The teacher's features at its layer, and the rest of its network."""
    state, image_shape = forward.state, forward.images.shape[1:]
    layer = layer_name(model, layer, image_shape)
    if teacher == "mask" or (teacher in METHODS and not layer):
        return jax.lax.stop_gradient(forward.features), head_fn
    variables = {
        "frozen": forward.teacher_variables,
        "average": {"params": state.ema_params, "batch_stats": state.batch_stats},
    }.get(teacher, forward.variables)
    features_fn, rest_fn = tap(
        model, jax.lax.stop_gradient(variables), layer, image_shape
    )
    if teacher in METHODS:
        if forward.inner is None:
            raise ValueError(f"train_step needs layer={layer!r}, for its teacher")
        return jax.lax.stop_gradient(forward.inner), rest_fn
    images = jax.lax.stop_gradient(forward.images)
    return if_guided(when, forward, lambda: features_fn(images)), rest_fn


def _or_mask(maps, answers):
    """The maps, but for the examples that have a mask: these have that."""
    mask = answers["mask"]
    given = masks.known(mask)[:, None, None]
    return jnp.where(given, masks.resized(mask, maps.shape[1:]), maps)


def sharpened(maps, power: float):
    """``(map / max) ** power``; the maps themselves for a power of 1."""
    return maps if power == 1.0 else saliency.normalize(maps) ** power


def is_guided(when, forward):
    """Whether this step is guided, a traced bool."""
    return jnp.bool_(True) if when is None else when(forward.state.step)


def if_guided(when, forward, make):
    """make(), or zeros in its place where the step is not guided."""
    if when is None:
        return make()
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make))
    return jax.lax.cond(is_guided(when, forward), make, lambda: nothing)
