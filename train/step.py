"""The training and evaluation steps: pure functions of (state, batch).

``train/loop.py`` binds the keyword arguments and wraps them once in pmap; with
``axis_name=None`` they run anywhere. A guided step makes one forward and one backward
pass through the backbone, like a plain one: saliency, bottleneck and feature update
live behind it, on the features. Metrics are (sum, count) pairs, summed over devices.
May import jax, optax and ``ibsgl_jax``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ibsgl_jax import feature_stats, guidance, losses, metrics, saliency
from ibsgl_jax.models import make_head_fn
from train.state import TrainState


def normalize_images(images, *, mean, std):
    """uint8 [N, H, W, 3] -> float32, each channel with the given mean and std."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def plain_step(state, batch, **options):
    """One step on the task loss alone; arguments and result as in ``guided_step``."""
    return penalized_step(state, batch, None, **options)


def guided_step(
    state, batch, *, config, mu, decay, teacher="bottleneck", axis_name=None, **options
):
    """One step on ``mean(task + mu * KL(A || A'))``; Algorithm 1, lines 3 to 12.

    Args:
      state: TrainState; may be donated.
      batch: image uint8 [N, H, W, 3], label int32 [N], place int32 [N] (of the example
        in the global batch; 0 .. N-1 if absent), and mask [N, H, W] for
        ``teacher="mask"``.
      config: GuidanceConfig.
      mu: function of the step: weight of the divergence.
      decay: of the moving feature statistics.
      teacher: "bottleneck", or "mask" for the object's true mask (an oracle).
      axis_name: pmap axis to average over; None for one device.
      **options: model, tx, base_key, image_stats (dict mean, std), label_smoothing.

    Returns:
      (state, metrics): metrics is a dict of (sum, count) float32 pairs.
    """

    def penalty_fn(forward):
        frozen = jax.lax.stop_gradient(forward.features)
        head_fn = make_head_fn(
            options["model"], jax.lax.stop_gradient(forward.variables)
        )
        stats = feature_stats.update_moving(
            state.feature_stats, frozen, decay=decay, axis_name=axis_name
        )
        guided = guidance.guide(
            forward.keys,
            head_fn,
            frozen,
            batch["label"],
            feature_stats.moments(
                stats, active_threshold=config.bottleneck.active_threshold
            ),
            config=config,
            teacher=_mask_map(batch, frozen) if teacher == "mask" else None,
        )
        kl = losses.feature_kl(
            forward.features,
            guided.target_features,
            over=config.kl_over,
            floor=config.kl_floor,
        )
        diagnostics = {
            "kl": kl,
            "saliency_loss": guided.loss,
            "saliency_loss_at_target": guided.target_loss,
            "relative_move": guided.relative_move,
            "blank_saliency": guided.blank,
        }
        return mu(state.step) * kl, stats, diagnostics

    return penalized_step(state, batch, penalty_fn, axis_name=axis_name, **options)


class Forward(NamedTuple):
    """What a penalty sees of the forward pass; all of it is differentiated.

    keys [N] of the examples, images [N, H, W, 3] normalised, labels [N], the model's
    variables, features [N, h, w, K], logits [N, C].
    """

    keys: jax.Array
    images: jax.Array
    labels: jax.Array
    variables: Any
    features: jax.Array
    logits: jax.Array


def penalized_step(
    state,
    batch,
    penalty_fn,
    *,
    model,
    tx,
    base_key,
    image_stats,
    label_smoothing=0.0,
    axis_name=None,
):
    """One step on ``mean(task + penalty)``.

    ``penalty_fn(Forward)`` gives the penalty [N], new feature statistics and a dict of
    diagnostics [N]; None for the task alone.
    """
    images = normalize_images(batch["image"], **image_stats)
    labels = batch["label"]
    # Keyed by the example's place in the global batch, so that the draws do not depend
    # on how many devices share it.
    places = batch.get("place", jnp.arange(labels.shape[0]))
    key = jax.random.fold_in(base_key, state.step)
    noise_keys, dropout_keys = jax.vmap(
        lambda place: tuple(jax.random.split(jax.random.fold_in(key, place))),
        out_axes=0,
    )(places)

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        features, updated = model.apply(
            variables, images, train=True, method="features", mutable=["batch_stats"]
        )
        logits = model.apply(
            variables,
            features,
            train=True,
            method="head",
            rngs={"dropout": dropout_keys[0]},
        )
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing
        )
        task = optax.softmax_cross_entropy(logits, targets)
        total, stats, diagnostics = task, state.feature_stats, {}
        if penalty_fn is not None:
            penalty, stats, diagnostics = penalty_fn(
                Forward(noise_keys, images, labels, variables, features, logits)
            )
            total = task + penalty
        per_example = {
            "loss": total,
            "task_loss": task,
            "accuracy": metrics.accuracy(logits, labels),
            **diagnostics,
        }
        sums = {k: metrics.sum_and_count(v) for k, v in per_example.items()}
        return jnp.mean(total), (updated.get("batch_stats", {}), stats, sums)

    gradient, (batch_stats, stats, sums) = jax.grad(loss_fn, has_aux=True)(state.params)
    if axis_name:
        gradient, batch_stats = jax.lax.pmean((gradient, batch_stats), axis_name)
        sums = jax.lax.psum(sums, axis_name)
    sums["gradient_norm"] = optax.tree.norm(gradient), jnp.float32(1.0)
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        feature_stats=stats,
    )
    return state, sums


def eval_step(variables, batch, *, model, image_stats, axis_name=None):
    """Accuracy, NLL and, with boxes, the share of L^c inside them, on one batch.

    Args:
      variables: params and batch_stats of the model.
      batch: image, label, example_mask [N] (1 = real, 0 = padding), bbox [N, 4] if the
        data set has boxes.

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
        "accuracy": metrics.sum_and_count(metrics.accuracy(logits, labels), real),
        "nll": metrics.sum_and_count(metrics.nll(logits, labels), real),
    }
    if "bbox" in batch:
        size = batch["image"].shape[1:3]
        share, known = metrics.box_share(
            saliency.upsample(maps[:, 0], size),
            metrics.boxes_to_mask(batch["bbox"], size),
        )
        sums["box_share"] = metrics.sum_and_count(share, known * real)
    return jax.lax.psum(sums, axis_name) if axis_name else sums


def _mask_map(batch, features):
    """The true mask at the resolution of the features, [N, H, W]."""
    return jax.image.resize(
        batch["mask"].astype(jnp.float32), features.shape[:3], "linear"
    )
