"""The numbers that a method reads from its phase, each in its range."""


def numbers(phase, **ranges) -> dict:
    """The named fields of a phase as floats.

    Args:
      phase: a section of the configuration.
      **ranges: (lowest, highest) of each field, both allowed.

    Raises:
      ValueError: a field that is absent or out of range.
    """
    values = {}
    for field, (low, high) in ranges.items():
        value = phase.get(field)
        if value is None or not low <= value <= high:
            raise ValueError(f"{field}={value}: give a number in [{low}, {high}]")
        values[field] = float(value)
    return values
