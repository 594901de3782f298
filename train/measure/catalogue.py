"""Every measure: how it is shown, and exactly what it is."""

import math
from typing import NamedTuple

NUM_STEPS = 20  # of the deletion and degradation curves
ROAD_FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
NUM_SIZES, NUM_MASKS = 8, 50  # of Sensitivity-n
NUM_THRESHOLDS = 20
NUM_BINS = 15
TILES_PER_SIDE = 12


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
METHOD_COLUMNS = (
    "drop",
    "increase",
    "area",
    "matched_drop",
    "matched_increase",
    "box_share",
    "pointing",
)


def format_value(key: str, value) -> str:
    """A number as tables show it: percents with one digit, others with three."""
    if value is None or not math.isfinite(value):
        return "–"
    percent = MEASURES[key].percent
    return f"{value * 100:.1f}" if percent else f"{value:.3f}"
