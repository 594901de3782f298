"""The training and evaluation steps: pure functions of (state, batch).

``build.make_step`` binds the keyword arguments and ``devices`` spreads them; with
``axis_name=None`` they run anywhere. A method is a penalty, a function of ``Forward``.
Metrics are (sum, count) pairs, summed over devices.
"""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ibsgl_jax import feature_stats, metrics, saliency, tapping
from ibsgl_jax.convolutions import fast_on_cpu
from ibsgl_jax.models import make_head_fn
from train.method import answers
from train.method.state import TrainState


def normalize_images(images, *, mean, std):
    """uint8 [N, H, W, 3] -> float32, each channel with the given mean and std."""
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


class Forward(NamedTuple):
    """What a penalty sees of a step; the forward pass in it is differentiated.

    Attributes:
      keys: [N], of the examples, by their places in the global batch.
      images: [N, H, W, 3], normalised.
      labels: [N]; of several per image the one that this step shows.
      variables: the model's, params and batch_stats.
      features, logits: [N, h, w, K] and [N, C], in training mode.
      inner: [N, h', w', K'], of the step's ``layer``, by the same pass; or None.
      head_fn: features -> logits [N, C], the head as this pass had it, in training mode
        and with its dropout; differentiable in the variables.
      task_fn: logits [N, C] -> the task's loss [N], weighted, smoothed and mixed.
      batch: as given, with mask [N, H, W] where the data set has masks, and positives
        [N, C] where images have several labels.
      feature_stats: moving moments before this step (or part of a batch).
      state: TrainState before the step.
      teacher_variables: of another network, if the phase has one.
      num_examples: of the global batch, over devices and parts.
    """

    keys: jax.Array
    images: jax.Array
    labels: jax.Array
    variables: Any
    features: jax.Array
    logits: jax.Array
    inner: jax.Array | None
    head_fn: Any
    task_fn: Any
    batch: dict
    feature_stats: feature_stats.FeatureStats
    state: TrainState
    teacher_variables: Any
    num_examples: int


def train_step(
    state,
    batch,
    teacher_variables=None,
    *,
    penalty_fn=None,
    layer="",
    model,
    tx,
    base_key,
    image_stats,
    class_weights=None,
    learning=None,
    label_smoothing=0.0,
    mixup=0.0,
    accumulate_steps=1,
    ema_decay=0.0,
    skip_nonfinite=False,
    axis_name=None,
):
    """One step on ``mean(task + penalty)``, the same for every method.

    Args:
      state: TrainState; may be donated.
      batch: image uint8 [N, H, W, 3], label int32 [N], place int32 [N] (in the global
        batch; 0 .. N-1 if absent), and what the penalty reads. With positives uint8
        [N, C] the task is ``metrics.nll`` of all of them, which says how it is scaled.
      teacher_variables: of another network, for a penalty that asks for them.
      penalty_fn: ``penalty_fn(Forward)`` gives the penalty [N], new feature statistics
        and a dict of diagnostics, (sum, count) pairs; None for the task alone.
      layer: a name of ``tapping.layer_names``, whose features the penalty sees too.
      model: with features and head methods; BatchNorm's axis is ``axis_name``.
      tx: optax transformation.
      base_key: of the phase; draws are keyed by step and place.
      image_stats: dict mean, std, for ``normalize_images``.
      class_weights: C weights of the task loss, by the label; None for ones.
      learning: names in ``params`` of the head, if it learns alone; None for all.
      label_smoothing: in [0, 1).
      mixup: alpha of Zhang et al., "mixup", ICLR 2018; 0 for none; see ``_make_mix``.
      accumulate_steps: parts that a device's batch is taken in, whose gradients are
        averaged; BatchNorm and the feature statistics see a part at a time.
      ema_decay: of the moving average of the parameters; 0 for none. The first steps
        forget faster, as (1 + step) / (10 + step).
      skip_nonfinite: leave everything but ``step`` as it was where the loss or the
        gradient is not finite, and count it in the metric "skipped".
      axis_name: pmap axis to average over; None for one device.

    Returns: (state, metrics): a dict of (sum, count) float32 pairs.
    """
    num_examples = batch["label"].shape[0]
    batch = {"place": jnp.arange(num_examples), **batch}
    key = jax.random.fold_in(base_key, state.step)
    num_examples *= jax.lax.axis_size(axis_name) if axis_name else 1
    shared = (state, teacher_variables, num_examples)
    forward_fn = functools.partial(
        _forward,
        model,
        key,
        layer=layer,
        learning=learning,
        image_stats=image_stats,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        mixup=mixup,
    )
    loss_fn = functools.partial(
        _loss, forward_fn=forward_fn, penalty_fn=penalty_fn, shared=shared
    )
    gradient_fn = fast_on_cpu(jax.grad(loss_fn, has_aux=True))
    gradient, (batch_stats, stats, sums) = _accumulate(
        gradient_fn, state, batch, accumulate_steps
    )
    if axis_name:
        gradient, batch_stats = jax.lax.pmean((gradient, batch_stats), axis_name)
        sums = jax.lax.psum(sums, axis_name)
    norm = optax.tree.norm(gradient)
    sums["gradient_norm"] = norm, jnp.float32(1.0)
    after = _update(state, gradient, tx, ema_decay, learning)
    after = after.replace(batch_stats=batch_stats, feature_stats=stats)
    return _skip(state, after, sums, norm) if skip_nonfinite else (after, sums)


def _loss(params, batch_stats, stats, batch, *, forward_fn, penalty_fn, shared):
    """``mean(task + penalty)``; new statistics of both kinds and the step's sums."""
    variables = {"params": params, "batch_stats": batch_stats}
    fields, batch_stats = forward_fn(variables, batch)
    forward = Forward(*fields, stats, *shared)
    task = forward.task_fn(forward.logits)
    total, diagnostics = task, {}
    if penalty_fn is not None:
        penalty, stats, diagnostics = penalty_fn(forward)
        total = task + penalty
    per_example = {
        "loss": total,
        "task_loss": task,
        "accuracy": metrics.accuracy(forward.logits, answers.all_of(batch)),
    }
    sums = jax.tree.map(metrics.sum_and_count, per_example) | diagnostics
    return jnp.mean(total), (batch_stats, stats, sums)


def _forward(
    model,
    key,
    variables,
    batch,
    *,
    layer,
    learning,
    image_stats,
    class_weights,
    label_smoothing,
    mixup,
):
    """The first fields of ``Forward`` and new batch_stats."""
    # Keyed by the example's place in the global batch, so that the draws do not
    # depend on how many devices share it.
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(batch["place"])
    noise_keys, dropout_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    mix = _make_mix(keys, mixup)
    images = mix(normalize_images(batch["image"], **image_stats))
    with tapping.kept(layer) as inner:
        if learning is None:
            features, updated = _train_features(model, variables, images, dropout_keys)
        else:
            features = model.apply(variables, images, method="features")
            features, updated = jax.lax.stop_gradient(features), {}
    if _is_still(variables, learning):
        logits = model.apply(variables, features, method="head")
    else:
        logits, updated = _train_head(
            model, {**variables, **updated}, features, dropout_keys
        )
    head_fn = make_head_fn(model, variables, train=True, **dropout(model, dropout_keys))
    task_fn = functools.partial(
        _task, batch, mix, class_weights=class_weights, label_smoothing=label_smoothing
    )
    inputs = noise_keys, images, batch["label"], variables
    outputs = features, logits, inner.get(layer)
    batch_stats = updated.get("batch_stats", variables.get("batch_stats", {}))
    return (*inputs, *outputs, head_fn, task_fn, batch), batch_stats


def _is_still(variables, learning) -> bool:
    """Whether a head that learns alone has BatchNorm, which then stays as it is.

    Its running statistics, by which it is measured, would not be those that it learns
    with: they are found in a pass of the whole network.
    """
    found = variables.get("batch_stats", {})
    return learning is not None and any(name in found for name in learning)


def _train_features(model, variables, images, keys):
    """Features in training mode and new batch_stats.

    Dropout in them draws by the first of the keys [N]: it depends on how many devices
    share the batch, as only a head can be told each example's own.
    """
    return model.apply(
        variables,
        images,
        train=True,
        method="features",
        mutable=["batch_stats"],
        rngs={"dropout": keys[0]},
    )


def _train_head(model, variables, features, keys):
    """Logits [N, C] in training mode, dropout by ``keys`` [N]; new batch_stats."""
    return model.apply(
        variables,
        features,
        train=True,
        method="head",
        mutable=["batch_stats"],
        **dropout(model, keys),
    )


def _task(batch, mix, logits, *, class_weights, label_smoothing):
    """The task's loss [N] of logits [N, C]."""
    labels = batch["label"]
    if answers.link_of(batch) == "softmax":
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing
        )
        task = optax.softmax_cross_entropy(logits, mix(targets))
    else:
        targets = batch["positives"].astype(jnp.float32)
        task = metrics.nll(logits, mix(targets), link="sigmoid")
    if class_weights is not None:
        task *= jnp.asarray(class_weights, jnp.float32)[labels]
    return task


def training_logits(model, variables, images, keys):
    """[N, C] in training mode, dropout by ``keys`` [N]; no running statistics."""
    features, _ = _train_features(model, variables, images, keys)
    logits, _ = _train_head(model, variables, features, keys)
    return logits


def dropout(model, keys) -> dict:
    """What makes the draws of dropout depend on each example's own key, keys [N].

    A head that takes no ``keys`` gets the first as Flax's "dropout" key; its draws then
    depend on how many devices share the batch.
    """
    takes_keys = "keys" in inspect.signature(type(model).head).parameters
    return {"keys": keys} if takes_keys else {"rngs": {"dropout": keys[0]}}


def _update(state, gradient, tx, ema_decay, learning):
    """The state after the optimizer's update, its statistics as they were."""
    # optax multiplies floats by its integer counters.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    if learning is not None:  # weight decay moves what has no gradient
        updates = {
            name: branch if name in learning else optax.tree.zeros_like(branch)
            for name, branch in updates.items()
        }
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_decay:
        done = state.step.astype(jnp.float32)
        rate = 1.0 - jnp.minimum(ema_decay, (1.0 + done) / (10.0 + done))
        ema_params = optax.incremental_update(params, ema_params, rate)
    return state.replace(
        step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema_params
    )


def _skip(state, after, sums, norm):
    """Where loss or gradient is not finite, the step alone moves on; it is counted."""
    finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"][0])
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
    sums = jax.tree.map(lambda value: jnp.where(finite, value, 0.0), sums)
    sums["skipped"] = 1.0 - finite.astype(jnp.float32), jnp.float32(1.0)
    return kept.replace(step=after.step), sums


def _accumulate(gradient_fn, state, batch, num_parts):
    """The gradient of the batch, taken in parts; statistics go from part to part."""
    batch_stats, stats = state.batch_stats, state.feature_stats
    if num_parts == 1:
        return gradient_fn(state.params, batch_stats, stats, batch)

    def take(carry, part):
        total, batch_stats, stats = carry
        gradient, (batch_stats, stats, sums) = gradient_fn(
            state.params, batch_stats, stats, part
        )
        return (optax.tree.add(total, gradient), batch_stats, stats), sums

    parts = jax.tree.map(lambda x: x.reshape(num_parts, -1, *x.shape[1:]), batch)
    start = optax.tree.zeros_like(state.params), batch_stats, stats
    (total, batch_stats, stats), sums = jax.lax.scan(take, start, parts)
    sums = jax.tree.map(lambda values: jnp.sum(values, axis=0), sums)
    return optax.tree.scale(1.0 / num_parts, total), (batch_stats, stats, sums)


def _make_mix(keys, alpha):
    """A function that mixes each of [N, ...] with the one before it, or does nothing.

    An example is mixed with the one before it on its device. Its own share is
    beta(alpha, alpha) and at least a half, so that it also keeps its label.
    """
    if not alpha:
        return lambda x: x
    draw = jax.vmap(
        lambda key: jax.random.beta(jax.random.fold_in(key, 2), alpha, alpha)
    )
    share = draw(keys)
    share = jnp.maximum(share, 1.0 - share)

    def mix(x):
        weight = share.reshape(-1, *[1] * (x.ndim - 1))
        return weight * x + (1.0 - weight) * jnp.roll(x, 1, axis=0)

    return mix


def eval_step(variables, batch, *, model, image_stats, axis_name=None):
    """``answers.scores`` and, with boxes, the share of L^c inside them, on one batch.

    Args:
      variables: params and batch_stats of the model.
      batch: image, label, example_mask [N] (1 = real, 0 = padding), bbox [N, 4] if the
        data set has boxes, positives [N, C] if images have several labels.

    Returns:
      Dict of (sum, count) pairs, summed over devices.
    """
    labels, real = batch["label"], batch["example_mask"]
    features = model.apply(
        variables, normalize_images(batch["image"], **image_stats), method="features"
    )
    logits, maps = saliency.logits_and_saliencies(
        make_head_fn(model, variables), features, labels[:, None]
    )
    sums = {
        name: metrics.sum_and_count(value, real)
        for name, value in answers.scores(logits, batch).items()
    }
    if "bbox" in batch:
        size = batch["image"].shape[1:3]
        share, known = metrics.box_share(
            saliency.upsample(maps[:, 0], size),
            metrics.boxes_to_mask(batch["bbox"], size),
        )
        known = answers.counted(known * real, batch)
        sums["box_share"] = metrics.sum_and_count(share, known)
    return jax.lax.psum(sums, axis_name) if axis_name else sums
