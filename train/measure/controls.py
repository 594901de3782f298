"""What a phase is compared with: a plain phase that had the same chances."""

from train.measure import statistics

SAME = ("init", "dataset", "num_epochs")


def control_of(config, name: str, phases) -> str | None:
    """The plain phase with the same start, data and number of epochs, if there is one.

    Args:
      config: of the run.
      name: of a phase.
      phases: names to choose from, in their order.
    """
    phase = config[name]
    if phase.method == "plain":
        return None
    for other in phases:
        candidate = config[other]
        if candidate.method == "plain" and all(
            candidate[field] == phase[field] for field in SAME
        ):
            return other
    return None


def without_control(run) -> list[str]:
    """The phases that have a method of their own and nothing to be compared with."""
    return [
        name
        for name in run.states
        if run.config[name].method != "plain"
        and control_of(run.config, name, run.states) is None
    ]


def differences(run, per_example: dict) -> dict:
    """Each phase against its control: dict phase -> {reference, measures}."""
    rows = {}
    for name in run.states:
        reference = control_of(run.config, name, run.states)
        if reference:
            values, others = (_of(per_example, phase) for phase in (name, reference))
            rows[name] = {
                "reference": reference,
                "measures": statistics.differences(values, others),
            }
    return rows


def _of(per_example, phase):
    """The values of a phase's own map."""
    prefix = f"{phase}/"
    return {
        key.removeprefix(prefix): value
        for key, value in per_example.items()
        if key.startswith(prefix) and "/" not in key.removeprefix(prefix)
    }
