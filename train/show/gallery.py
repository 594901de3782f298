"""The report's gallery: images under their maps in two phases, and what changed."""

import base64
import io

import numpy as np

from train import devices
from train.data import dataset
from train.measure import splits
from train.measure.batch import class_maps
from train.show import figures

MAX_GALLERY_BYTES = 4_000_000
# How many images of each kind the gallery takes, in this order.
GALLERY = {"first": 48, "fixed": 36, "broken": 16, "moved": 36}


def data_uri(image, *, quality):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def gallery(run, source, results, per_example) -> list:
    """The entries of the gallery: pictures, predictions and what changed.

    The first images of the split, images that the second model put right or got wrong,
    and those whose share of saliency in the box moved most, as far as they fit.
    """
    before, after = results["before"], results["after"]

    def value(phase, key):
        return per_example.get(f"{phase}/{key}")

    right = [value(phase, "accuracy") > 0 for phase in (before, after)]
    shares = [value(phase, "box_share") for phase in (before, after)]
    moved = None if shares[0] is None else np.nan_to_num(shares[1] - shares[0])
    candidates = {
        "first": np.arange(len(source)),
        "fixed": np.flatnonzero(~right[0] & right[1]),
        "broken": np.flatnonzero(right[0] & ~right[1]),
        "moved": [] if moved is None else np.argsort(-np.abs(moved), kind="stable"),
    }
    chosen = list(
        dict.fromkeys(
            int(index)
            for kind, number in GALLERY.items()
            for index in candidates[kind][:number]
        )
    )
    maps = [_class_maps(run, phase, source, chosen) for phase in (before, after)]
    entries, size = [], 0
    batches = splits.placed_batches(run.config, dataset.Examples(source, chosen))
    for batch in batches:
        for row in np.flatnonzero(batch["example_mask"] > 0):
            place = batch["place"][row]
            index = chosen[place]
            entry = {
                "index": index,
                "label": int(batch["label"][row]),
                "first": index < GALLERY["first"],
                "right": [bool(r[index]) for r in right],
                "says": [int(value(p, "predicted")[index]) for p in (before, after)],
                "p": [
                    round(float(value(p, "probability")[index]), 3)
                    for p in (before, after)
                ],
            }
            if moved is not None and all(np.isfinite(s[index]) for s in shares):
                entry["share"] = [round(float(s[index]), 3) for s in shares]
            bbox = batch["bbox"][row] if "bbox" in batch else None
            heats = (None, maps[0][place], maps[1][place])
            entry["pictures"] = [
                _thumbnail(batch["image"][row], heat, bbox) for heat in heats
            ]
            size += sum(map(len, entry["pictures"]))
            if size > MAX_GALLERY_BYTES:
                return entries
            entries.append(entry)
    return entries


def _class_maps(run, phase, source, indices):
    """L^c / max L^c of some images, [n, H, W]; 0 where a map is not finite."""
    variables = run.states[phase].variables
    step = devices.compiled(_maps_step, run.config, run.model)
    maps = splits.map_split(
        run.config,
        dataset.Examples(source, indices),
        lambda batch: step(variables, batch),
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
