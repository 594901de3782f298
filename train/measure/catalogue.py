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


# Parts of definitions that several measures share.
_DROP = (
    "Average Drop (Chattopadhay et al. 2018): mean of max(p - o, 0) / p, where p is "
    "the label's probability on the image and o on the "
)
_INCREASE = "Average Increase: share of images with o > p, o on the "
_PRODUCT = "normalised image times map / max(map) (hidden pixels: mean colour)"
_MATCHED = (
    _PRODUCT + "; each map raised to the power that gives it the common mean area"
)
_HALF = (
    "image with the 50 % most salient pixels kept, unscaled, the others at the mean "
    "colour (Score-CAM's variant)"
)
_SCALED = (
    "after dividing the logits by one temperature, fitted on validation (in a table of "
    "validation: on the very images)"
)
_RIVAL = "the true object's box; low where the maps separate."
_DELETED = (
    "RISE: area under the label's probability while the most salient pixels are "
    "replaced by {}, {} steps; not divided by p."
)
_RESTORED = (
    "RISE: area under the label's probability while the most salient pixels are "
    "restored, starting from {}, {} steps; not divided by p."
)
_BLUR = "the image blurred (sigma 5, 11 x 11)"
_COLOUR = "the image's mean colour"
_TILES = (
    "IBA's degradation: area under the label's probability while tiles "
    f"({TILES_PER_SIDE} a side) become the image's mean colour, "
)


def _prediction(title, better, definition):
    return Measure("Prediction", title, better, False, definition)


def _location(title, definition, better="higher"):
    return Measure("Localisation", title, better, False, definition)


def _faith(title, better, definition, percent=True):
    return Measure("Faithfulness", title, better, percent, definition)


def _perturbed(title, better, definition):
    return Measure("Perturbation", title, better, False, definition)


def _maps(title, better, definition):
    return Measure("Two maps", title, better, False, definition)


MEASURES = {
    "accuracy": _prediction(
        "accuracy",
        "higher",
        "Top 1; of several labels per image exact match: the logits above 0 are those "
        "of its labels, all of them and no other.",
    ),
    "balanced_accuracy": _prediction(
        "mean over classes",
        "higher",
        "Mean over the classes that occur of the accuracy in each (balanced accuracy).",
    ),
    "worst_class": _prediction(
        "worst class",
        "higher",
        "Accuracy of the class where it is lowest; low for classes of few images, and "
        "its interval lower.",
    ),
    "top_label": _prediction(
        "top label",
        "higher",
        "Share of images whose strongest class is one of their labels (precision at "
        "1), of those that have one: where each has just one label, its accuracy.",
    ),
    "label_accuracy": _prediction(
        "accuracy per label",
        "higher",
        "Share of the classes whose logit is above 0 where the image has the label and "
        "not above it elsewhere; never naming a rare one is right nearly always.",
    ),
    "mean_ap": _prediction(
        "mAP",
        "higher",
        "Mean over the classes that occur of the average precision of their logits; by "
        "chance it is about their frequency.",
    ),
    "nll": _prediction(
        "NLL",
        "lower",
        "Negative log-likelihood of the label, nats; of several labels per image the "
        "mean over the classes of the binary ones.",
    ),
    "calibration_error": _prediction(
        "calibration error",
        "lower",
        f"Expected calibration error, {NUM_BINS} equal bins of the confidence (Guo et "
        "al. 2017). Resampling adds to it: its interval lies high.",
    ),
    "nll_scaled": _prediction(
        "NLL, scaled", "lower", f"NLL {_SCALED} (Guo et al. 2017)."
    ),
    "calibration_scaled": _prediction(
        "calibration error, scaled", "lower", f"Calibration error {_SCALED}."
    ),
    "temperature": _prediction(
        "temperature",
        "",
        "That temperature: above 1 the network is too sure of itself, below 1 not sure "
        "enough.",
    ),
    "box_share": _location(
        "box share",
        "Share of the positive saliency inside the box (energy pointing game).",
    ),
    "pointing": _location(
        "pointing",
        "Pointing game: share of maps whose maximum lies in the box; no tolerance, any "
        "of equal maxima; a constant map misses.",
    ),
    "iou": _location(
        "IoU at .5",
        "Intersection over union of the box and the pixels above half the maximum.",
    ),
    "iou_best": _location(
        "IoU, best",
        "The same at the one threshold, common to all images and chosen on this split, "
        f"with the best mean (grid of {NUM_THRESHOLDS}).",
    ),
    "iou_oracle": _location(
        "IoU, oracle", "The same with the best threshold of each image."
    ),
    "corloc": _location(
        "CorLoc",
        "Share of images in which the box of the largest connected part of the map "
        "above half of its maximum has an IoU of at least .5 with the true one.",
    ),
    "max_box_acc": _location(
        "MaxBoxAcc",
        "CorLoc at the one threshold, common to all images and chosen on this split, "
        f"at which it is highest (grid of {NUM_THRESHOLDS}; Choe et al. 2020).",
    ),
    "bbox_ratio": _location(
        "bbox ratio",
        "IBA's: share of the n most salient pixels that lie in the box of n pixels; "
        "boxes of at most 33 % of the image.",
    ),
    "p_box_share": _location(
        "box share of L^p", "Share of L^p of the runner-up p in " + _RIVAL, ""
    ),
    "p_pointing": _location(
        "pointing of L^p", "Share of maps L^p whose maximum lies in " + _RIVAL, ""
    ),
    "drop": _faith("AD %", "lower", f"{_DROP}{_PRODUCT}."),
    "increase": _faith("AI %", "higher", f"{_INCREASE}{_PRODUCT}."),
    "matched_drop": _faith("AD %, equal area", "lower", f"{_DROP}{_MATCHED}."),
    "matched_increase": _faith("AI %, equal area", "higher", f"{_INCREASE}{_MATCHED}."),
    "half_drop": _faith("AD %, 50 % pixels", "lower", f"{_DROP}{_HALF}."),
    "half_increase": _faith("AI %, 50 % pixels", "higher", f"{_INCREASE}{_HALF}."),
    "area": _faith(
        "map area",
        "",
        "Mean of map / max(map). AD and AI reward large maps: read them together.",
        percent=False,
    ),
    "deletion_black": _perturbed(
        "Deletion AUC, black", "lower", _DELETED.format("black", NUM_STEPS)
    ),
    "insertion_black": _perturbed(
        "Insertion AUC, black", "higher", _RESTORED.format("black", NUM_STEPS)
    ),
    "deletion_mean": _perturbed(
        "Deletion AUC, mean", "lower", _DELETED.format(_COLOUR, NUM_STEPS)
    ),
    "insertion_mean": _perturbed(
        "Insertion AUC, mean", "higher", _RESTORED.format(_COLOUR, NUM_STEPS)
    ),
    "deletion_blur": _perturbed(
        "Deletion AUC, blur", "lower", _DELETED.format(_BLUR, NUM_STEPS)
    ),
    "insertion_blur": _perturbed(
        "Insertion AUC, blur", "higher", _RESTORED.format(_BLUR, NUM_STEPS)
    ),
    "morf": _perturbed("MoRF", "lower", _TILES + "most relevant first."),
    "lerf": _perturbed("LeRF", "higher", _TILES + "least relevant first."),
    "degradation": _perturbed(
        "LeRF - MoRF", "higher", "The area between the two degradation curves."
    ),
    "road": _perturbed(
        "ROAD",
        "higher",
        f"Mean over the fractions {', '.join(f'{f:g}' for f in ROAD_FRACTIONS)} of "
        "(LeRF - MoRF) / 2, the label's probability after noisy linear imputation "
        "(noise .01).",
    ),
    "sensitivity_n": _perturbed(
        "Sensitivity-n",
        "higher",
        f"Pearson correlation over {NUM_MASKS} random sets of n pixels between their "
        "saliency and the label's logit lost when they become the mean colour; mean "
        f"over {NUM_SIZES} sizes n from 1 pixel to 80 %.",
    ),
    "overlap": _maps(
        "overlap",
        "lower",
        "2 sum(min(L^c, L^p)) / sum(L^c + L^p) of the true class c and the runner-up "
        "p. It also falls when one map loses mass.",
    ),
    "cosine": _maps("cosine", "lower", "Cosine of L^c and L^p."),
    "mass_c": _maps("mass of L^c", "", "Sum of L^c over the features' cells, logits."),
    "mass_p": _maps("mass of L^p", "", "Sum of L^p over the features' cells, logits."),
    "mass_ratio": _maps(
        "mass ratio",
        "lower",
        "Sum of the masses of L^p over that of L^c, both over all images.",
    ),
    "p_on_object": _maps(
        "L^p on the object",
        "lower",
        "Sum of what of L^p lies in the true object's box over the masses of L^c, "
        "both over all images: unlike overlap, L^c losing mass makes it worse.",
    ),
    "blank": _maps("blank maps", "lower", "Share of images whose L^c is all zero."),
}
# Of several labels per image only.
OF_SEVERAL = ("top_label", "label_accuracy", "mean_ap")
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
