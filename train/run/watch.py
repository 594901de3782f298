"""What is watched while a phase runs: sums of metrics, memory, traces."""

import math
import resource
import sys

import jax

# Looked for first when something is not finite: these are what the others are made of.
CAUSES = ("task_loss", "saliency_loss", "kl")
# Made of everything else.
OUTCOMES = ("loss", "gradient_norm")


class NonFiniteError(RuntimeError):
    """A term of the loss became NaN or infinite; one line that says which and when."""


class Window:
    """Sums and counts of the metrics since the last log line.

    Args:
      sums: dict name -> [sum, count] to go on from.
    """

    def __init__(self, sums=None):
        self.sums = {k: list(v) for k, v in (sums or {}).items()}

    def add(self, metrics, *, where: str):
        """Take in a dict of (sum, count) pairs.

        Raises:
          NonFiniteError: a sum is not finite; names the term that broke first.
        """
        broken = [k for k, (total, _) in metrics.items() if not math.isfinite(total)]
        if broken:
            name = min(broken, key=_rank)
            raise NonFiniteError(f"{name} is {float(metrics[name][0])} {where}")
        for name, (total, count) in metrics.items():
            entry = self.sums.setdefault(name, [0.0, 0.0])
            entry[0] += float(total)
            entry[1] += float(count)

    def means(self) -> dict:
        """Mean of each metric; those that nothing was counted in are left out."""
        return {k: total / count for k, (total, count) in self.sums.items() if count}


def _rank(name):
    if name in CAUSES:
        return CAUSES.index(name)
    return len(CAUSES) + (1 + OUTCOMES.index(name) if name in OUTCOMES else 0)


def memory_bytes() -> int:
    """Peak memory so far: of the fullest local device, of the process on a CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(each["peak_bytes_in_use"] for each in stats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Trace:
    """Writes a profiler trace of a window of steps.

    Args:
      window: (first, last) step of the trace, or None for no trace.
      folder: where it goes, in the layout that TensorBoard and Perfetto read.
    """

    def __init__(self, window, folder):
        self._window = window
        self._folder = str(folder)
        self._running = False

    def before(self, step: int):
        if self._window and step == self._window[0]:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, state):
        if self._running and step == self._window[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self):
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()
