"""How much an evaluation measures, what that costs, and what fits into two minutes.

Costs are counted in passes of one image through the network, a compilation of a
program in those of ``measure``; the first batch says how long each of the two takes.
"""

import dataclasses
import time
from typing import NamedTuple

import jax

from ibsgl_jax import attribution
from train import devices, programs
from train.data import dataset
from train.measure import splits
from train.measure.batch import measure

# An evaluation that takes no longer than the first is made whole; any other is cut
# down to the second, which leaves room: estimates were found up to a quarter too low.
# Seconds.
COMPLETE, BUDGET = 300, 95
# Passes of an image through the network.
PASSES = {"measures": 6, "deletion": 42, "perturbed": 180, "sensitivity": 400}
METHOD_PASSES = {"smooth_grad": 75, "integrated_gradients": 150, "full_grad": 6}
OTHER_METHOD = 3
SCORING = 5  # of a map: the measures that need few passes
# Compilations, in those of ``measure``: of a part, of a method, of what every
# evaluation has (logits, scores of maps, pictures, gallery) and of two more pictures.
COMPILED = {"deletion": 0.5, "perturbed": 2.0, "sensitivity": 0.7}
METHOD_COMPILED, ALWAYS_COMPILED, PICTURES_COMPILED = 0.4, 4.5, 1.5
# Of what every evaluation has, what its training compiled and left in the cache.
FOUND_COMPILED = 2.3
FEWEST = 32  # images, where there are so many


@dataclasses.dataclass(frozen=True)
class Options:
    """How many examples each part of an evaluation takes: the first ones.

    Attributes:
      split: of the data set; the config's test split if None.
      limit: of the split at all; None for all of it.
      num_images: of these; None for all, else drawn at random, the same ones always.
      num_perturbed: for deletion, degradation and ROAD.
      deletion_only: of these, deletion and insertion by the mean colour alone.
      num_sensitivity: for Sensitivity-n.
      num_method_images: for the table of methods.
      num_sanity: for the randomised weights.
      num_statistics: training images for the statistics of the features.
      methods: of ``attribution.METHODS``.
      pictures: all of them, not only the first one.
    """

    split: str | None = None
    limit: int | None = None
    num_images: int | None = None
    num_perturbed: int = 128
    deletion_only: bool = False
    num_sensitivity: int = 32
    num_method_images: int = 128
    num_sanity: int = 64
    num_statistics: int = 1024
    methods: tuple = tuple(attribution.METHODS)
    pictures: bool = True


CHEAP = ("ib", "hirescam", "grad_cam", "layer_cam", "gradient")
# From the most to the least; the number of images is what then fits.
RUNGS = (
    dict(
        methods=CHEAP,
        num_method_images=64,
        num_sanity=32,
        num_perturbed=32,
        num_sensitivity=0,
        num_statistics=256,
    ),
    dict(
        methods=("ib", "hirescam", "grad_cam"),
        num_method_images=32,
        num_sanity=16,
        num_perturbed=16,
        deletion_only=True,
        num_sensitivity=0,
        num_statistics=128,
        pictures=False,
    ),
    dict(
        methods=("hirescam", "grad_cam"),
        num_method_images=16,
        num_sanity=8,
        num_perturbed=0,
        num_sensitivity=0,
        num_statistics=64,
        pictures=False,
    ),
)


class Speed(NamedTuple):
    """What one batch told.

    Attributes:
      seconds: of a pass of one image.
      compilation: of ``measure``, seconds; what it would be, where it was found.
      batch: its size.
      found: whether ``measure`` was among the kept programs.
    """

    seconds: float
    compilation: float
    batch: int
    found: bool = False


class Sizes(NamedTuple):
    """images: of the source; phases: to be measured; shown: phases in the pictures."""

    images: int
    phases: int
    shown: int


def drawn(source, number: int | None):
    """So many examples of a source, the same ones always; all, mixed, if None.

    A folder's pictures stand class by class: the first ones would say little.
    """
    if number is None or number >= len(source):
        return dataset.mixed(source)
    return dataset.Examples(dataset.shuffled(source), range(number))


def parts_of(source, options: Options) -> dict:
    """The examples of each part: the first ones of those of "measures"."""
    source = drawn(source, options.num_images)
    return {
        name: dataset.first_examples(source, number)
        for name, number in _numbers(options, len(source)).items()
    }


def method_passes(method: str) -> int:
    """Of one image, to make and to score a map of it."""
    return METHOD_PASSES.get(method, OTHER_METHOD) + SCORING


def cost(part: str, number: int, batch: int) -> int:
    """Passes that a part of so many images takes, in whole batches."""
    passes = PASSES[part] if part in PASSES else method_passes(part)
    return passes * -(-number // batch) * batch


def _numbers(options: Options, images: int) -> dict:
    """Images per part."""
    images = min(images, options.num_images or images)
    perturbed = "deletion" if options.deletion_only else "perturbed"
    return {
        "measures": images,
        perturbed: min(images, options.num_perturbed),
        "sensitivity": min(images, options.num_sensitivity),
        "methods": min(images, options.num_method_images),
        "sanity": min(images, options.num_method_images, options.num_sanity),
    }


def total_passes(options: Options, sizes: Sizes, batch: int) -> int:
    """Of the phases' parts and of the methods, as they are counted while they run."""
    numbers = _numbers(options, sizes.images)
    maps = sizes.shown * numbers["methods"] + numbers["sanity"]
    return sizes.phases * sum(
        cost(part, number, batch) for part, number in numbers.items() if part in PASSES
    ) + sum(method_passes(method) * maps for method in options.methods)


def total_seconds(options: Options, sizes: Sizes, speed: Speed) -> float:
    """About how long an evaluation takes."""
    numbers = _numbers(options, sizes.images)
    passes = total_passes(options, sizes, speed.batch)
    passes += sizes.phases * 2 * numbers["measures"]  # logits, of validation too
    passes += (sizes.shown + 1) * options.num_statistics
    programs = ALWAYS_COMPILED - FOUND_COMPILED * speed.found
    programs += METHOD_COMPILED * len(options.methods)
    programs += PICTURES_COMPILED * options.pictures
    programs += sum(COMPILED.get(part, 0) for part, n in numbers.items() if n)
    return passes * speed.seconds + programs * speed.compilation


def numbers_of(sources: dict, options: Options) -> dict:
    """What evaluation.json tells of the plan: images per part, and what was cut."""
    perturbed = sources.get("perturbed", sources.get("deletion"))
    return {
        "num_perturbed": len(perturbed),
        "num_sensitivity": len(sources["sensitivity"]),
        "num_method_images": len(sources["methods"]),
        "num_sanity": len(sources["sanity"]),
        "num_statistics": options.num_statistics,
        "pictures": options.pictures,
        "reduced": len(options.methods) < len(attribution.METHODS),
    }


def choose(options: Options, sizes: Sizes, speed: Speed) -> Options:
    """The options as they are if that takes at most ``COMPLETE`` seconds, else less.

    Less is the first of ``RUNGS`` that fits into ``BUDGET`` with half of the images or
    more, and as many images as fit, but ``FEWEST`` at least.
    """
    if total_seconds(options, sizes, speed) <= COMPLETE:
        return options
    for rung in RUNGS:
        cut = {
            key: min(value, getattr(options, key))
            if isinstance(value, int) and not isinstance(value, bool)
            else value
            for key, value in rung.items()
        }
        less = dataclasses.replace(options, **cut)
        number = _images_that_fit(less, sizes, speed)
        if number >= sizes.images // 2:
            break
    number = max(number, min(FEWEST, sizes.images))
    return dataclasses.replace(
        less, num_images=None if number >= sizes.images else number
    )


def _images_that_fit(options, sizes, speed) -> int:
    def fits(number):
        less = dataclasses.replace(options, num_images=number)
        return total_seconds(less, sizes, speed) <= BUDGET

    numbers = range(speed.batch, sizes.images + speed.batch, speed.batch)
    return min(max((n for n in numbers if fits(n)), default=0), sizes.images)


def time_first_batch(config, model, variables, source) -> Speed:
    """Measure the first batch, which compiles ``measure``, and once more.

    What others do on the machine shall not decide what is measured: where a call waits
    for a core, the time that it worked counts. A program that an earlier command has
    compiled counts as if this one had.
    """
    step = devices.compiled(measure, config, model, matched_area=config.matched_area)
    batch = devices.shard(next(iter(splits.placed_batches(config, source))))
    seconds, known = [], programs.saved_seconds()
    for _ in range(2):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(step(variables, batch))
        end = time.perf_counter(), time.process_time()
        seconds.append(min(end[0] - start[0], end[1] - start[1]))
    first, again = seconds
    saved = programs.saved_seconds() - known
    return Speed(
        seconds=again / (PASSES["measures"] * config.batch_size),
        compilation=max(first - again, 0.0) + saved,
        batch=config.batch_size,
        found=saved > 0,
    )
