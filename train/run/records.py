"""What a phase tells while it runs: metrics, speed, the bar; validation scores."""

import collections
import time

import jax
from tqdm import tqdm

from train import devices
from train.data.batches import iterate
from train.run import watch
from train.run.log import PhaseLog
from train.run.trackers import Trackers

# A step's metrics are read this many steps later, so that the device never waits.
LAG = 2


class Records:
    """The metrics of a phase's steps, added up and written once an interval.

    Args:
      workdir, config, plan: of the run and the phase (``plan.Plan``).
      start: step that the phase goes on from.
      window: ``watch.Window`` to go on from.
      last_checkpoint: () -> folder of the last good one, for the message of a failure.
    """

    def __init__(self, workdir, config, plan, *, start, window, last_checkpoint):
        self._config, self._plan = config, plan
        self._last_checkpoint = last_checkpoint
        self._pending = collections.deque()
        self.window = window
        self._last_log, self._clock = start, time.perf_counter()
        self._log = PhaseLog(workdir, plan.name, start, tensorboard=config.tensorboard)
        names = config.get("trackers", ()) if jax.process_index() == 0 else ()
        self._trackers = Trackers(names, workdir, plan.name, config)
        self._bar = tqdm(
            total=plan.num_steps,
            initial=start,
            desc=f"{plan.name:>8}",
            disable=not config.progress or jax.process_index() != 0,
        )

    def __enter__(self):
        self._log.__enter__()
        return self

    def __exit__(self, *error):
        self._bar.close()
        self._trackers.close()
        self._log.__exit__(*error)

    def add(self, step: int, sums):
        """The metrics of a step, on the device as they are."""
        self._pending.append((step, sums))
        self._read(LAG)
        self._bar.update()

    def write(self, step: int):
        """One line of metrics and one of speed since the last one."""
        self._read(0)
        means = self.window.means()
        rate = float(self._plan.schedule(step - 1))
        self._log.write(step, "train", {**means, "learning_rate": rate})
        seconds = (time.perf_counter() - self._clock) / (step - self._last_log)
        speed = {
            "images_per_second": self._config.batch_size / seconds,
            "step_seconds": seconds,
            "memory_bytes": watch.memory_bytes(),
        }
        self._log.write(step, "train", speed, file="timing")
        self._trackers.write("train", {**means, "learning_rate": rate, **speed}, step)
        self._bar.set_postfix(_short(means, speed))
        self.window, self._last_log = watch.Window(), step
        self._clock = time.perf_counter()

    def write_validation(self, step: int, measure) -> dict:
        """The scores that ``measure()`` gives; its time is no part of a step's."""
        self._read(0)
        busy = time.perf_counter()
        scores = measure()
        self._log.write(step, "validation", scores)
        self._trackers.write("validation", scores, step)
        self._clock += time.perf_counter() - busy
        return scores

    def sync(self) -> dict:
        """All is on disk, as a checkpoint will assume; what the window holds."""
        self._read(0)
        self._log.sync()
        return watch.Window(self.window.sums).sums

    def _read(self, limit):
        """Take in the metrics of steps that are done, all but the last ones."""
        while len(self._pending) > limit:
            step, sums = self._pending.popleft()
            where = f"at step {step} of phase {self._plan.name}"
            try:
                self.window.add(jax.device_get(sums), where=where)
            except watch.NonFiniteError as error:
                last = self._last_checkpoint() or "none yet"
                raise watch.NonFiniteError(
                    f"{error}; last good checkpoint: {last}"
                ) from None


def validation_scores(eval_fn, batches, variables, where: str) -> dict:
    """Means over a split: sums and counts added up, divided once."""
    window = watch.Window()
    for batch in iterate(batches):
        sums = jax.device_get(eval_fn(variables, devices.shard(batch)))
        window.add(sums, where=f"in the evaluation {where}")
    return window.means()


def _short(means, speed) -> dict:
    """What fits beside the progress bar."""
    known = {k: means[k] for k in ("loss", "accuracy", "skipped") if k in means}
    text = {name: f"{value:.3f}" for name, value in known.items()}
    return {
        **text,
        "images/s": f"{speed['images_per_second']:.0f}",
        "GB": f"{speed['memory_bytes'] / 1e9:.1f}",
    }
