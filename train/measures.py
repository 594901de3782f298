"""What is measured about a model and its maps, per example, on one batch.

Steps of (variables, batch), pure, which ``train/evaluate.py`` wraps in pmap. Maps are
of the true class and at the image's resolution. May import jax, ``ibsgl_jax`` and
``train.step``. ``MEASURES`` names every measure and says exactly what it is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import attribution, metrics, perturbation, saliency
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.models import make_features_fn, make_head_fn
from train.step import normalize_images

DELETED = (0.0, 0.3, 0.6, 0.9)  # shares of the pixels in the deletion figure
SUBSTRATES = ("black", "mean", "blur")
NUM_STEPS = 20  # of the deletion and degradation curves
ROAD_FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
NUM_SIZES, NUM_MASKS = 8, 50  # of Sensitivity-n
NUM_THRESHOLDS = 20
NUM_BINS = 15
TILES_PER_SIDE = 12
BOTTLENECK = BottleneckConfig(num_steps=20)


class Measure(NamedTuple):
    """How a measure is shown and what it is.

    better: "higher", "lower", or "" where neither is. percent: shown times 100.
    """

    group: str
    title: str
    better: str
    percent: bool
    definition: str


def _measures():
    matched = "; each map raised to the power that gives it the common mean area"
    drop = (
        "Average Drop (Chattopadhay et al. 2018): mean of max(p - o, 0) / p, where p "
        "is the label's softmax probability on the image and o on the "
    )
    increase = "Average Increase: share of images with o > p, o on the "
    product = "normalised image times map / max(map) (hidden pixels: mean colour)"
    half = (
        "image with the 50 % most salient pixels kept, unscaled, the others at the "
        "mean colour (Score-CAM's variant)"
    )
    yield "accuracy", Measure("Prediction", "accuracy", "higher", False, "Top 1.")
    yield (
        "nll",
        Measure(
            "Prediction",
            "NLL",
            "lower",
            False,
            "Negative log-likelihood of the label, nats.",
        ),
    )
    yield (
        "calibration_error",
        Measure(
            "Prediction",
            "calibration error",
            "lower",
            False,
            f"Expected calibration error, {NUM_BINS} equal bins of the confidence "
            "(Guo et al. 2017). Resampling adds to it: its interval lies high.",
        ),
    )
    scaled = "after dividing the logits by one temperature, fitted on validation"
    for name, title, better, text in (
        ("nll_scaled", "NLL, scaled", "lower", f"NLL {scaled} (Guo et al. 2017)."),
        (
            "calibration_scaled",
            "calibration error, scaled",
            "lower",
            f"Calibration error {scaled}.",
        ),
        (
            "temperature",
            "temperature",
            "",
            "That temperature: above 1 the network is too sure of itself, below 1 not "
            "sure enough.",
        ),
    ):
        yield name, Measure("Prediction", title, better, False, text)
    for name, title, text in (
        (
            "box_share",
            "box share",
            "Share of the positive saliency inside the box (energy pointing game).",
        ),
        (
            "pointing",
            "pointing",
            "Pointing game: share of maps whose maximum lies in the box; no tolerance, "
            "any of equal maxima; a constant map misses.",
        ),
        (
            "iou",
            "IoU at .5",
            "Intersection over union of the box and the pixels above half the maximum.",
        ),
        (
            "iou_best",
            "IoU, best",
            "The same at the one threshold, common to all images and chosen on this "
            f"split, with the best mean (grid of {NUM_THRESHOLDS}).",
        ),
        (
            "iou_oracle",
            "IoU, oracle",
            "The same with the best threshold of each image.",
        ),
        (
            "bbox_ratio",
            "bbox ratio",
            "IBA's: share of the n most salient pixels that lie in the box of n "
            "pixels; boxes of at most 33 % of the image.",
        ),
    ):
        yield name, Measure("Localisation", title, "higher", False, text)
    for name, title, text in (
        ("p_box_share", "box share of L^p", "Share of L^p of the runner-up p in"),
        ("p_pointing", "pointing of L^p", "Share of maps L^p whose maximum lies in"),
    ):
        definition = f"{text} the true object's box; low where the maps separate."
        yield name, Measure("Localisation", title, "", False, definition)
    for prefix, title, text in (
        ("", "", product),
        ("matched_", ", equal area", product + matched),
        ("half_", ", 50 % pixels", half),
    ):
        yield (
            prefix + "drop",
            Measure("Faithfulness", "AD %" + title, "lower", True, drop + text + "."),
        )
        yield (
            prefix + "increase",
            Measure(
                "Faithfulness", "AI %" + title, "higher", True, increase + text + "."
            ),
        )
    yield (
        "area",
        Measure(
            "Faithfulness",
            "map area",
            "",
            False,
            "Mean of map / max(map). AD and AI reward large maps: read them together.",
        ),
    )
    for substrate, what in (
        ("black", "black"),
        ("mean", "the image's mean colour"),
        ("blur", "the image blurred (sigma 5, 11 x 11)"),
    ):
        for name, title, better in (
            ("deletion", "Deletion AUC", "lower"),
            ("insertion", "Insertion AUC", "higher"),
        ):
            verb = "replaced by" if name == "deletion" else "restored, starting from"
            yield (
                f"{name}_{substrate}",
                Measure(
                    "Perturbation",
                    f"{title}, {substrate}",
                    better,
                    False,
                    f"RISE: area under the label's probability while the most salient "
                    f"pixels are {verb} {what}, {NUM_STEPS} steps; not divided by p.",
                ),
            )
    tiles = (
        "IBA's degradation: area under the label's probability while tiles "
        f"({TILES_PER_SIDE} a side) become the image's mean colour, "
    )
    yield (
        "morf",
        Measure(
            "Perturbation",
            "MoRF",
            "lower",
            False,
            tiles + "most relevant first.",
        ),
    )
    yield (
        "lerf",
        Measure(
            "Perturbation",
            "LeRF",
            "higher",
            False,
            tiles + "least relevant first.",
        ),
    )
    yield (
        "degradation",
        Measure(
            "Perturbation",
            "LeRF - MoRF",
            "higher",
            False,
            "The area between the two degradation curves.",
        ),
    )
    yield (
        "road",
        Measure(
            "Perturbation",
            "ROAD",
            "higher",
            False,
            "Mean over the fractions "
            + ", ".join(f"{f:g}" for f in ROAD_FRACTIONS)
            + " of (LeRF - MoRF) / 2, the label's probability after noisy linear "
            "imputation (noise .01).",
        ),
    )
    yield (
        "sensitivity_n",
        Measure(
            "Perturbation",
            "Sensitivity-n",
            "higher",
            False,
            f"Pearson correlation over {NUM_MASKS} random sets of n pixels between "
            "their saliency and the label's logit lost when they become the mean "
            f"colour; mean over {NUM_SIZES} sizes n from 1 pixel to 80 %.",
        ),
    )
    for name, title, better, text in (
        (
            "overlap",
            "overlap",
            "lower",
            "2 sum(min(L^c, L^p)) / sum(L^c + L^p) of the true class c and the "
            "runner-up p. It also falls when one map loses mass.",
        ),
        ("cosine", "cosine", "lower", "Cosine of L^c and L^p."),
        ("mass_c", "mass of L^c", "", "Sum of L^c over the features' cells, logits."),
        ("mass_p", "mass of L^p", "", "Sum of L^p over the features' cells, logits."),
        ("blank", "blank maps", "lower", "Share of images whose L^c is all zero."),
    ):
        yield name, Measure("Two maps", title, better, False, text)


MEASURES = dict(_measures())


def measure(variables, batch, *, model, image_stats, matched_area) -> dict:
    """The measures of L^c of the true class that need few passes (see ``MEASURES``).

    Maps are upsampled bilinearly to the image. Localisation is against the box, or the
    object's mask where there is no box, and left out where there is neither. What
    needs a runner-up is left out for a single class.

    Args:
      variables: of the model.
      batch: image uint8 [N, H, W, 3], label [N] and what there is of bbox and mask.
      model: with ``features`` and ``head``.
      image_stats: of ``step.normalize_images``.
      matched_area: the common area of the matched measures.

    Returns:
      dict of float32 [N], NaN where undefined; ``iou_curve`` is [N, NUM_THRESHOLDS].
      Beside ``MEASURES``: confidence, predicted, probability (of the label) and
      runner_up_probability.
    """
    images = normalize_images(batch["image"], **image_stats)
    labels, size = batch["label"], images.shape[1:3]
    head_fn = make_head_fn(model, variables)

    def classes_fn(logits):
        if logits.shape[-1] < 2:
            return labels[:, None]
        return jnp.stack([labels, saliency.runner_up(logits, labels)], axis=1)

    features = model.apply(variables, images, method="features")
    logits, maps = saliency.logits_and_saliencies(head_fn, features, classes_fn)
    map_c = maps[:, 0]
    full_c = saliency.upsample(map_c, size)
    values = {
        "accuracy": metrics.accuracy(logits, labels),
        "nll": metrics.nll(logits, labels),
        "confidence": jnp.max(jax.nn.softmax(logits), axis=-1),
        "predicted": jnp.argmax(logits, axis=-1).astype(jnp.float32),
        "probability": metrics.probability(logits, labels),
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
        map_p, other = maps[:, 1], saliency.runner_up(logits, labels)
        values |= {
            "overlap": metrics.overlap(map_c, map_p),
            "cosine": metrics.cosine(map_c, map_p),
            "mass_p": metrics.mass(map_p),
            "runner_up_probability": metrics.probability(logits, other),
        }
        target = target_mask(batch)
        if target is not None:
            full_p = saliency.upsample(map_p, size)
            values["p_box_share"] = _known(metrics.box_share(full_p, target))
            values["p_pointing"] = _known(metrics.pointing_hit(full_p, target))
    return values


def _known(score_and_count):
    """The score, NaN where it is not defined."""
    score, count = score_and_count
    return jnp.where(count > 0, score, jnp.nan)


def measure_maps(variables, batch, maps, *, model, image_stats, matched_area) -> dict:
    """The measures of any maps [N, H, W] that need few passes; as ``measure``."""
    images = normalize_images(batch["image"], **image_stats)
    prob_fn = make_prob_fn(model, variables, batch["label"])
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
        curve, _ = metrics.iou_curve(maps, target, num_thresholds=NUM_THRESHOLDS)
        for name, score in {
            "box_share": metrics.box_share(maps, target),
            "pointing": metrics.pointing_hit(maps, target),
            "iou": metrics.iou(maps, target),
            "iou_oracle": metrics.best_iou(maps, target, num_thresholds=NUM_THRESHOLDS),
            "bbox_ratio": metrics.bounding_box_ratio(maps, target),
        }.items():
            values[name] = _known(score)
        known = jnp.isfinite(values["iou"])[:, None]
        values["iou_curve"] = jnp.where(known, curve, jnp.nan)
    return values


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
    prob_fn = make_prob_fn(model, variables, batch["label"])
    maps = class_maps(variables, batch, model=model, image_stats=image_stats)
    baselines = {
        "black": black(image_stats),
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
        return values
    tiles = perturbation.degradation(
        prob_fn,
        images,
        maps,
        baselines["mean"],
        tile=-(-maps.shape[1] // TILES_PER_SIDE),
        num_steps=NUM_STEPS,
    )
    values["morf"] = jnp.trapezoid(tiles.morf, tiles.fractions, axis=-1)
    values["lerf"] = jnp.trapezoid(tiles.lerf, tiles.fractions, axis=-1)
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
    return values


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
    return {"sensitivity_n": jnp.mean(curve, axis=0)}


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
    options = {"config": BOTTLENECK} if method == "ib" else {}
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


def class_maps(variables, batch, *, model, image_stats):
    """L^c of the true class, [N, H, W]."""
    images = normalize_images(batch["image"], **image_stats)
    features = model.apply(variables, images, method="features")
    maps = saliency.class_saliency(
        make_head_fn(model, variables), features, batch["label"]
    )
    return saliency.upsample(maps, images.shape[1:3])


def make_prob_fn(model, variables, labels):
    """images -> the softmax probability of their labels, [N]."""
    head_fn = make_head_fn(model, variables)

    def prob_fn(images):
        features = model.apply(variables, images, method="features")
        return metrics.probability(head_fn(features), labels)

    return prob_fn


def target_mask(batch):
    """Where the object is, bool [N, H, W], or None if the data set does not say."""
    if "bbox" in batch:
        return metrics.boxes_to_mask(batch["bbox"], batch["image"].shape[1:3])
    return batch["mask"] > 0 if "mask" in batch else None


def black(image_stats):
    """A black pixel, normalised: [3]."""
    return -jnp.asarray(image_stats["mean"]) / jnp.asarray(image_stats["std"])


def map_change(maps, other_maps) -> np.ndarray:
    """How little maps change between two networks: rank correlation [N].

    1 for maps that are equal up to scale, constant ones among them, which have no
    rank correlation; NaN where a map is not finite.
    """
    correlation = metrics.rank_correlation(maps, other_maps)
    same = jnp.all(
        jnp.isclose(_scaled(maps), _scaled(other_maps), atol=1e-6), axis=(1, 2)
    )
    return np.asarray(jnp.where(same, 1.0, correlation))


def _scaled(maps):
    peak = jnp.max(jnp.abs(maps), axis=(1, 2), keepdims=True)
    return maps / jnp.where(peak == 0, 1.0, peak)


def calibration_error(confidence, correct) -> float:
    """``metrics.calibration_error`` of NumPy arrays [N] over a whole split."""
    index = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)

    def bin_sums(weights):
        return np.bincount(index, weights, NUM_BINS)

    bins = metrics.CalibrationBins(
        confidence=bin_sums(confidence),
        correct=bin_sums(correct),
        count=bin_sums(np.ones(len(index))),
    )
    gap = np.abs(bins.correct - bins.confidence).sum()
    return float(gap / max(bins.count.sum(), 1))
