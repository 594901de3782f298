"""The report's gallery: images under their maps in two phases, and what changed."""

import base64
import io

import numpy as np

from train.data import dataset
from train.measure import splits
from train.measure.batch import class_maps
from train.show import figures

MAX_GALLERY_BYTES = 4_000_000
# How many images of each kind the gallery takes, in this order.
GALLERY = {
    "worst": 36,
    "first": 36,
    "fixed": 24,
    "broken": 24,
    "changed": 12,
    "moved": 24,
}
# A map L^c of less, in logits, explains nothing: it fades to none.
NEGLIGIBLE = 1e-3


def data_uri(image, *, quality):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def gallery(run, source, results, per_example, places) -> list:
    """The entries of the gallery: pictures, predictions and what changed.

    The images whose true class the second model gives the least probability, the first
    ones of the split, those that it put right, got wrong or calls something else, and
    those whose share of saliency in the box moved most, as far as they fit.

    Args:
      run, source, results, per_example: as for ``report.write_report``.
      places: of the source's examples in their split.
    """
    phases = results["before"], results["after"]

    def pair(key):
        return [per_example.get(f"{phase}/{key}") for phase in phases]

    # Of several labels per image: one without any has nothing to show.
    some = np.arange(len(source))
    positives = per_example.get(f"{phases[0]}/positives")
    if positives is not None:
        some = np.flatnonzero(positives.any(axis=1))
    keys = "accuracy", "predicted", "probability", "box_share"
    values = ([v if v is None else v[some] for v in pair(key)] for key in keys)
    chosen = [int(some[index]) for index in choose(*values)]
    shares, masses = pair("box_share"), pair("mass_c")
    maps = [_class_maps(run, phase, source, chosen) for phase in phases]
    entries, size = [], 0
    batches = splits.placed_batches(run.config, dataset.Examples(source, chosen))
    for batch in batches:
        for row in np.flatnonzero(batch["example_mask"] > 0):
            place = batch["place"][row]
            index = chosen[place]
            mass = [float(np.nan_to_num(m[index])) for m in masses]
            entry = {
                "index": int(places[index]),
                "label": int(batch["label"][row]),
                "first": index < GALLERY["first"],
                "right": [bool(r[index] > 0) for r in pair("accuracy")],
                "says": [int(p[index]) for p in pair("predicted")],
                "p": [round(float(p[index]), 3) for p in pair("probability")],
                "negligible": [
                    f"{m:.1e} logits" if m < NEGLIGIBLE else None for m in mass
                ],
            }
            if shares[0] is not None and all(np.isfinite(s[index]) for s in shares):
                entry["share"] = [round(float(s[index]), 3) for s in shares]
            bbox = batch["bbox"][row] if "bbox" in batch else None
            heats = [
                part[place] * min(1.0, m / NEGLIGIBLE)
                for part, m in zip(maps, mass, strict=True)
            ]
            entry["pictures"] = [
                _thumbnail(batch["image"][row], heat, bbox) for heat in (None, *heats)
            ]
            size += sum(map(len, entry["pictures"]))
            if size > MAX_GALLERY_BYTES:
                return entries
            entries.append(entry)
    return entries


def choose(accuracy, predicted, probability, shares) -> list[int]:
    """The indices that the gallery shows, of pairs (before, after) of arrays [N]."""
    right = [values > 0 for values in accuracy]
    moved = []
    if shares[0] is not None:
        moved = np.argsort(-np.abs(np.nan_to_num(shares[1] - shares[0])), kind="stable")
    candidates = {
        "worst": np.argsort(np.nan_to_num(probability[1]), kind="stable"),
        "first": np.arange(len(right[0])),
        "fixed": np.flatnonzero(~right[0] & right[1]),
        "broken": np.flatnonzero(right[0] & ~right[1]),
        "changed": np.flatnonzero(predicted[0] != predicted[1]),
        "moved": moved,
    }
    return list(
        dict.fromkeys(
            int(index)
            for kind, number in GALLERY.items()
            for index in candidates[kind][:number]
        )
    )


def _class_maps(run, phase, source, indices):
    """L^c / max L^c of some images, [n, H, W]; 0 where a map is not finite."""
    maps = splits.collect(
        _maps_step,
        run.config,
        run.model,
        dataset.Examples(source, indices),
        run.states[phase].variables,
    )["maps"]
    maps = np.nan_to_num(maps, posinf=0.0, neginf=0.0)
    peaks = maps.max(axis=(1, 2), keepdims=True)
    return maps / np.where(peaks > 0, peaks, 1.0)


def _maps_step(variables, batch, *, model, image_stats):
    return {"maps": class_maps(variables, batch, model=model, image_stats=image_stats)}


def _thumbnail(image, heat, bbox):
    from PIL import Image

    picture = figures.overlay(image, heat, bbox=bbox)
    return data_uri(Image.fromarray(picture), quality=82)
