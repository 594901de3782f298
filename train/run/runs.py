"""Runs read back for a notebook: their metrics as a table."""

import json
from pathlib import Path

from train.errors import ConfigError


def read(workdir, *, file: str = "metrics"):
    """The metrics of a run as a pandas DataFrame, one row per log line.

    Args:
      workdir: folder of the run.
      file: "metrics", or "timing" for speed and memory.

    Returns:
      DataFrame with columns phase, step, split and one per metric, NaN where a line
      does not have it. A line that a kill cut short is left out.

    Raises:
      ConfigError: there is no such file, or no pandas.

    Example:
      frame = read("runs/photos").query("split == 'validation'")
      frame.pivot(index="step", columns="phase", values="accuracy").plot()
    """
    try:
        import pandas
    except ImportError:
        raise ConfigError("no package pandas: pip install pandas") from None

    path = Path(workdir) / f"{file}.jsonl"
    if not path.exists():
        raise ConfigError(f"{path} is not there: no run, or none that has begun")
    rows = []
    for text in path.read_text().splitlines():
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return pandas.DataFrame(rows, columns=_columns(rows))


def _columns(rows):
    first = ["phase", "step", "split"]
    return first + sorted({key for row in rows for key in row} - set(first))
