"""What is measured of one trained network, part by part, per example."""

from typing import Any, NamedTuple

from train.measure import splits, temperature
from train.measure.batch import measure_method, perturb, sensitivity


class Network(NamedTuple):
    """One phase of a run, whose config, model and data the others are."""

    config: Any
    model: Any
    variables: Any
    data: Any


# Parts that are one step over the examples, with its options.
STEPS = {
    "deletion": (perturb, {"substrates": ("mean",), "others": False}),
    "perturbed": (perturb, {}),
    "sensitivity": (sensitivity, {}),
}


def part_values(network: Network, part: str, source, *, validation=None, progress=None):
    """The values of one part for every example of a source.

    Args:
      network: what is measured.
      part: "measures" (``batch.measure`` and the temperature) or one of ``STEPS``.
      source: sequence of examples.
      validation: what the temperature is fitted on; the run's validation split if None.
      progress: called after every batch.

    Returns:
      dict of NumPy arrays [number of examples, ...].
    """
    config, model, variables, data = network
    if part == "measures":
        if validation is None:
            validation = data.validation
        values = splits.measure_split(
            config, model, variables, source, progress=progress
        )
        return values | temperature.measure_split(
            config, model, variables, source, validation=validation
        )
    step, options = STEPS[part]
    return splits.collect(
        step, config, model, source, variables, progress=progress, **options
    )


def method_values(network: Network, method: str, source, moments, *, progress=None):
    """The measures of a method's maps, per example; as ``part_values``."""
    config, model, variables, _ = network
    return splits.collect(
        measure_method,
        config,
        model,
        source,
        variables,
        moments,
        progress=progress,
        method=method,
        matched_area=config.matched_area,
    )
