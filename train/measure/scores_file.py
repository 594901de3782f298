"""The scores of a run on disk: what they hold, and what is still to be measured."""

import json
from pathlib import Path

from ibsgl_jax import attribution
from train.errors import UserError

# The parts of a phase's scores, each with its own number of images, and what one batch
# of them costs in batches of the first.
COSTS = {"measures": 1, "deletion": 6, "perturbed": 20, "methods": 3}


def path(workdir, split: str) -> Path:
    """Where the scores of a run on a split are."""
    return Path(workdir) / f"scores_{split}.json"


def read(workdir, split: str) -> dict:
    """The record: run, split, seed, jax, phases; empty if nothing is measured.

    ``phases`` is a dict phase -> {"measures": part, "deletion": part (by the mean
    colour only), "perturbed": part (all of ``batch.perturb``), "methods": dict
    method -> part}; a part is {limit, num_images, means, undefined}: how many
    images were asked for (None: all), how many there were, the mean of each measure
    over the images where it is defined, and on how many it is not.

    Raises:
      UserError: the file is damaged.
    """
    file = path(workdir, split)
    try:
        record = json.loads(file.read_text())
    except FileNotFoundError:
        return {"phases": {}}
    except (ValueError, RecursionError):
        record = None
    if not _is_whole(record):
        raise UserError(f"{file} is damaged; delete it, to measure again")
    return record


def _is_whole(record) -> bool:
    """Whether it is what ``read`` says."""
    try:
        return all(
            {"limit", "num_images"} <= entry.keys() and isinstance(entry["means"], dict)
            for scores in record["phases"].values()
            for part, entries in scores.items()
            for entry in (entries.values() if part == "methods" else [entries])
        )
    except (TypeError, KeyError, AttributeError):
        return False


def finished_phases(workdir, phases) -> tuple:
    """Those of the phases that are trained to their end, in their order."""
    models = Path(workdir) / "models"
    return tuple(p for p in phases if (models / f"{p}.npz").exists())


def to_measure(record: dict, phases, limits: dict, methods=()) -> list[tuple]:
    """What the record lacks: tuples (phase, part, method or None).

    Args:
      record: as from ``read``.
      phases: names.
      limits: dict of the number of images of each part of ``COSTS``; None is all of
        the split and 0 leaves the part out.
      methods: names of ``attribution.METHODS``.
    """
    wanted = [
        (phase, part, method)
        for phase in phases
        for part, limit in limits.items()
        for method in (methods if part == "methods" else (None,))
        if limit != 0
    ]

    def known(phase, part, method):
        entry = record["phases"].get(phase, {}).get(part, {})
        entry = entry.get(method, {}) if method else entry
        return "means" in entry and entry["limit"] == limits[part]

    return [task for task in wanted if not known(*task)]


def add_options(parser, number):
    """The options that say what is measured; ``train.sweep`` has the same ones.

    ``number`` makes the type of a whole number from its lowest value.
    """
    parser.add_argument("--limit", type=number(1), help="images of the split at most")
    parser.add_argument(
        "--num-perturbed",
        type=number(0),
        default=512,
        help="images for deletion and insertion by the mean colour; 0 leaves them out",
    )
    parser.add_argument(
        "--all-perturbations",
        action="store_true",
        help="of them also by black and blur, degradation and ROAD: four times as long",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        choices=attribution.METHODS,
        metavar="METHOD",
        help="also the maps of these: " + ", ".join(attribution.METHODS),
    )
    parser.add_argument(
        "--num-method-images",
        type=number(1),
        default=512,
        help="images for the methods",
    )


def limits_of(arguments) -> dict:
    """The limits of ``to_measure`` that the options of ``add_options`` ask for."""
    return {
        "measures": arguments.limit,
        "deletion": 0 if arguments.all_perturbations else arguments.num_perturbed,
        "perturbed": arguments.num_perturbed if arguments.all_perturbations else 0,
        "methods": arguments.num_method_images,
    }


def means(scores: dict) -> dict:
    """The means of a phase's own map, of all its parts."""
    return {key: mean for key, (mean, _) in measured(scores).items()}


def measured(scores: dict) -> dict:
    """measure -> (its mean, of how many images): in two parts, the one of more."""
    parts = ("measures", "deletion", "perturbed")
    known = [scores[part] for part in parts if "means" in scores.get(part, {})]
    return {
        key: (mean, part["num_images"])
        for part in sorted(known, key=lambda part: part["num_images"])
        for key, mean in part["means"].items()
    }
