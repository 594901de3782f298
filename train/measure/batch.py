"""What is measured about a model and its maps, per example, on one batch.

Pure steps of (variables, batch), which ``devices.compiled`` spreads. Maps are of the
true class and at the image's resolution; ``catalogue.MEASURES`` says what each is.
Where images have several labels that is the first one of each, and what is measured of
a map is NaN for an image without any.
"""

import jax
import jax.numpy as jnp

from ibsgl_jax import attribution, metrics, perturbation, saliency
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.models import make_features_fn, make_head_fn
from train.measure.catalogue import (
    NUM_MASKS,
    NUM_SIZES,
    NUM_STEPS,
    NUM_THRESHOLDS,
    ROAD_FRACTIONS,
    TILES_PER_SIDE,
)
from train.method import answers
from train.method.step import normalize_images

DELETED = (0.0, 0.3, 0.6, 0.9)  # shares of the pixels in the deletion figure
SUBSTRATES = ("black", "mean", "blur")
BOTTLENECK = BottleneckConfig(num_steps=20)


def measure(variables, batch, *, model, image_stats, matched_area) -> dict:
    """The measures of L^c of the true class that need few passes (see ``MEASURES``).

    Maps are upsampled bilinearly to the image. Localisation is against the box, or the
    object's mask where there is no box, and left out where there is neither. What
    needs a runner-up is left out for a single class.

    Args:
      variables: of the model.
      batch: image uint8 [N, H, W, 3], label [N] and what there is of positives, bbox
        and mask.
      model: with ``features`` and ``head``.
      image_stats: of ``step.normalize_images``.
      matched_area: the common area of the matched measures.

    Returns:
      dict of float32 [N], NaN where undefined; ``iou_curve`` and ``box_curve`` are
      [N, NUM_THRESHOLDS].
      Beside ``MEASURES``: confidence, predicted, probability (of the label) and
      runner_up_probability; of several labels per image the logits and positives
      [N, C] in place of the confidence.
    """
    images = normalize_images(batch["image"], **image_stats)
    labels, size = batch["label"], images.shape[1:3]
    head_fn = make_head_fn(model, variables)

    def classes_fn(logits):
        if logits.shape[-1] < 2:
            return labels[:, None]
        return jnp.stack([labels, answers.runner_up(logits, batch)], axis=1)

    features = model.apply(variables, images, method="features")
    logits, maps = saliency.logits_and_saliencies(head_fn, features, classes_fn)
    map_c = maps[:, 0]
    full_c = saliency.upsample(map_c, size)
    predictions = {
        **answers.scores(logits, batch),
        "predicted": jnp.argmax(logits, axis=-1).astype(jnp.float32),
    }
    if "positives" in batch:
        predictions |= {"logits": logits, "positives": batch["positives"]}
    else:
        predictions["confidence"] = jnp.max(jax.nn.softmax(logits), axis=-1)
    values = {
        "probability": answers.probability(logits, batch),
        "mass_c": metrics.mass(map_c),
        "blank": (metrics.mass(map_c) <= 0).astype(jnp.float32),
        **measure_maps(
            variables,
            batch,
            full_c,
            model=model,
            image_stats=image_stats,
            matched_area=matched_area,
        ),
    }
    if logits.shape[-1] > 1:
        map_p, other = maps[:, 1], answers.runner_up(logits, batch)
        rival = {
            "overlap": metrics.overlap(map_c, map_p),
            "cosine": metrics.cosine(map_c, map_p),
            "mass_p": metrics.mass(map_p),
            "runner_up_probability": answers.probability(logits, batch, other),
        }
        target = target_mask(batch)
        if target is not None:
            full_p = saliency.upsample(map_p, size)
            rival["p_box_share"] = _known(metrics.box_share(full_p, target))
            rival["p_pointing"] = _known(metrics.pointing_hit(full_p, target))
        values |= answers.rivalled(rival, batch)
    return predictions | answers.shown(values, batch)


def _known(score_and_count):
    """The score, NaN where it is not defined."""
    score, count = score_and_count
    return jnp.where(count > 0, score, jnp.nan)


def measure_maps(variables, batch, maps, *, model, image_stats, matched_area) -> dict:
    """The measures of any maps [N, H, W] that need few passes; as ``measure``."""
    images = normalize_images(batch["image"], **image_stats)
    prob_fn = make_prob_fn(model, variables, batch)
    probs = prob_fn(images)
    values = {"area": metrics.map_area(maps)}
    explained = {
        "": metrics.explanation_map(images, maps),
        "matched_": metrics.explanation_map(
            images, metrics.match_area(maps, matched_area)
        ),
        "half_": metrics.keep_top(images, maps, fraction=0.5),
    }
    for prefix, seen in explained.items():
        explained_probs = prob_fn(seen)
        values[prefix + "drop"] = metrics.drop(probs, explained_probs)
        values[prefix + "increase"] = metrics.increase(probs, explained_probs)
    target = target_mask(batch)
    if target is not None:
        bbox, _ = metrics.mask_boxes(target)
        curve, _ = metrics.iou_curve(maps, target, num_thresholds=NUM_THRESHOLDS)
        box_curve, has_box = metrics.box_accuracy_curve(
            maps, bbox, num_thresholds=NUM_THRESHOLDS
        )
        for name, score in {
            "box_share": metrics.box_share(maps, target),
            "pointing": metrics.pointing_hit(maps, target),
            "iou": metrics.iou(maps, target),
            "iou_oracle": metrics.best_iou(maps, target, num_thresholds=NUM_THRESHOLDS),
            "bbox_ratio": metrics.bounding_box_ratio(maps, target),
            # The curve's threshold of a half.
            "corloc": (box_curve[:, NUM_THRESHOLDS // 2], has_box),
        }.items():
            values[name] = _known(score)
        known = jnp.isfinite(values["iou"])[:, None]
        for name, scores in (("iou_curve", curve), ("box_curve", box_curve)):
            values[name] = jnp.where(known, scores, jnp.nan)
    return answers.shown(values, batch)


def perturb(
    variables, batch, *, model, image_stats, substrates=SUBSTRATES, others=True
) -> dict:
    """The measures of L^c that need hundreds of passes: deletion, degradation, ROAD.

    Args:
      variables, batch, model, image_stats: as for ``measure``.
      substrates: what deleted pixels become, of ``SUBSTRATES``.
      others: degradation and ROAD too.

    Returns:
      dict of float32 [N]; ``deletion_curve`` and ``insertion_curve`` (black) and
      ``fractions`` are [N, NUM_STEPS + 1].
    """
    images = normalize_images(batch["image"], **image_stats)
    prob_fn = make_prob_fn(model, variables, batch)
    maps = class_maps(variables, batch, model=model, image_stats=image_stats)
    baselines = {
        "black": black_pixel(image_stats),
        "mean": perturbation.mean_baseline(images),
        "blur": perturbation.blur_baseline(images),
    }
    values = {}
    for name in substrates:
        curves = perturbation.deletion_insertion(
            prob_fn, images, maps, baselines[name], num_steps=NUM_STEPS
        )
        values[f"deletion_{name}"] = curves.deletion_auc
        values[f"insertion_{name}"] = curves.insertion_auc
        if name == "black":
            values["deletion_curve"] = curves.deletion
            values["insertion_curve"] = curves.insertion
            values["fractions"] = jnp.broadcast_to(
                curves.fractions, curves.deletion.shape
            )
    if not others:
        return answers.shown(values, batch)
    tiles = perturbation.degradation(
        prob_fn,
        images,
        maps,
        baselines["mean"],
        tile=-(-maps.shape[1] // TILES_PER_SIDE),
        num_steps=NUM_STEPS,
    )
    values["morf"] = jnp.trapezoid(tiles.morf, tiles.fractions[None], axis=-1)
    values["lerf"] = jnp.trapezoid(tiles.lerf, tiles.fractions[None], axis=-1)
    values["degradation"] = tiles.area
    morf, lerf = (
        perturbation.road(
            jax.random.key(0),
            prob_fn,
            images,
            maps,
            fractions=ROAD_FRACTIONS,
            order=order,
            num_iterations=100,
        )
        for order in ("morf", "lerf")
    )
    values["road"] = jnp.mean(lerf - morf, axis=-1) / 2.0
    return answers.shown(values, batch)


def sensitivity(variables, batch, *, model, image_stats) -> dict:
    """``sensitivity_n`` of L^c [N], the mean over sizes; thousands of passes."""
    images = normalize_images(batch["image"], **image_stats)
    head_fn = make_head_fn(model, variables)
    labels = batch["label"]

    def logit_fn(images):
        logits = head_fn(model.apply(variables, images, method="features"))
        return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]

    maps = class_maps(variables, batch, model=model, image_stats=image_stats)
    sizes = perturbation.sensitivity_sizes(
        maps.shape[1] * maps.shape[2], num_sizes=NUM_SIZES
    )
    curve = jax.lax.map(
        lambda size: perturbation.sensitivity_n(
            jax.random.key(0),
            logit_fn,
            images,
            maps,
            num_features=size,
            num_masks=NUM_MASKS,
        ),
        jnp.asarray(sizes),
    )
    return answers.shown({"sensitivity_n": jnp.mean(curve, axis=0)}, batch)


def method_maps(variables, moments, batch, *, method, model, image_stats):
    """Maps [N, H, W] of the true class by one of ``attribution.METHODS``.

    What is drawn at random is keyed by ``batch["place"]``, the example's place in the
    split, so that neither batch size nor the number of devices changes a map.
    """
    images = normalize_images(batch["image"], **image_stats)
    keys = jax.vmap(lambda place: jax.random.fold_in(jax.random.key(0), place))(
        batch["place"]
    )
    tapped_fn = None
    if method == "full_grad":
        tapped_fn = attribution.make_tapped_fn(model, variables, train=False)
    options = {}
    if method == "ib":
        options = {"config": BOTTLENECK, "loss": answers.link_of(batch)}
    return attribution.attribute(
        method,
        make_features_fn(model, variables),
        make_head_fn(model, variables),
        images,
        batch["label"],
        key=keys,
        moments=moments,
        tapped_fn=tapped_fn,
        **options,
    )


def measure_method(variables, moments, batch, *, method, matched_area, **bound):
    """``batch.measure_maps`` of the maps of one method, in one program."""
    maps = method_maps(variables, moments, batch, method=method, **bound)
    return measure_maps(variables, batch, maps, matched_area=matched_area, **bound)


def class_maps(variables, batch, *, model, image_stats):
    """L^c of the true class, [N, H, W]."""
    images = normalize_images(batch["image"], **image_stats)
    features = model.apply(variables, images, method="features")
    maps = saliency.class_saliency(
        make_head_fn(model, variables), features, batch["label"]
    )
    return saliency.upsample(maps, images.shape[1:3])


def make_prob_fn(model, variables, batch):
    """images -> the probability of the batch's labels, [N]."""
    head_fn = make_head_fn(model, variables)

    def prob_fn(images):
        features = model.apply(variables, images, method="features")
        return answers.probability(head_fn(features), batch)

    return prob_fn


def target_mask(batch):
    """Where the object is, bool [N, H, W], or None if the data set does not say.

    Within its box; where an image has none, its mask.
    """
    mask = batch["mask"] > 0 if "mask" in batch else None
    if "bbox" not in batch:
        return mask
    inside = metrics.boxes_to_mask(batch["bbox"], batch["image"].shape[1:3])
    if mask is None:
        return inside
    return inside | (mask & ~jnp.any(inside, axis=(1, 2), keepdims=True))


def black_pixel(image_stats):
    """A black pixel, normalised: [3]."""
    return -jnp.asarray(image_stats["mean"]) / jnp.asarray(image_stats["std"])
