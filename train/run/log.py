"""The logs of a run: metrics.jsonl, timing.jsonl and TensorBoard's events."""

import json
import os
from pathlib import Path

import jax

from train.files import write_text


class PhaseLog:
    """Appends the log lines of one phase; on other processes than 0 it does nothing.

    Args:
      workdir: folder of the run.
      phase: name of the phase.
      start_step: lines of this phase after this step are dropped: the run goes on from
        there and will write them again.
      tensorboard: also write event files.
    """

    def __init__(self, workdir: Path, phase: str, start_step: int, *, tensorboard=True):
        self._phase = phase
        self._files = {}
        self._events = None
        if jax.process_index() != 0:
            return
        for name in ("metrics", "timing"):
            path = workdir / f"{name}.jsonl"
            _drop_lines(path, phase, start_step)
            self._files[name] = open(path, "a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(
                str(workdir / "tensorboard" / phase), purge_step=start_step + 1
            )

    def write(self, step: int, split: str, values: dict, *, file: str = "metrics"):
        """One line: phase, step, split and the values."""
        if not self._files:
            return
        line = {"phase": self._phase, "step": step, "split": split, **values}
        self._files[file].write(json.dumps(line) + "\n")
        self._files[file].flush()
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(f"{split}/{name}", value, step)

    def sync(self):
        """Everything written so far is on disk, as a checkpoint will assume."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        for file in self._files.values():
            file.close()
        if self._events:
            self._events.close()


def _drop_lines(path: Path, phase: str, last_step: int):
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the line that a kill cut short
            continue
        if line["phase"] != phase or line["step"] <= last_step:
            kept.append(text + "\n")
    write_text(path, "".join(kept))
