"""Attribution methods side by side, and whether their maps follow the weights."""

import contextlib
import time

import jax
import numpy as np

from ibsgl_jax import attribution, metrics
from train import devices
from train.measure import splits, statistics
from train.measure.batch import measure_maps, method_maps
from train.method.build import make_optimizer, make_schedule
from train.method.state import create_state

# A map that ranks the pixels like this one under random weights explains no model.
SANITY_LIMIT = 0.5


def evaluate_methods(run, models, explained, random_part, bar):
    """The table of methods, the check by random weights and the per-example values."""
    config = run.config
    score_fn = devices.compiled(
        _score_maps,
        config,
        run.model,
        num_carried=1,
        matched_area=config.matched_area,
    )
    tx = make_optimizer(config.optimizer, make_schedule(1.0, 2, 0))
    fresh = create_state(
        jax.random.key(config.seed + 1), run.model, tx, config.image_size
    )
    all_models = {**{name: s.variables for name, s in models.items()}}
    all_models[None] = fresh.variables
    moments = {
        name: splits.data_set_moments(config, run.model, variables, run.data.train)
        for name, variables in all_models.items()
    }
    rows, sanity, per_example = [], {}, {}
    first = next(iter(models))
    for method in attribution.METHODS:
        bar.set_postfix_str(method)
        fn = devices.compiled(
            method_maps, config, run.model, num_carried=2, method=method
        )
        batch = devices.shard(next(iter(splits.placed_batches(config, explained))))
        jax.block_until_ready(fn(all_models[first], moments[first], batch))  # compile
        for name in models:
            clock = _Clock()

            def score(batch, name=name, clock=clock, fn=fn):
                with clock:
                    maps = jax.block_until_ready(
                        fn(all_models[name], moments[name], batch)
                    )
                return {**score_fn(all_models[name], (batch, maps)), "maps": maps}

            values = splits.map_split(
                config, explained, score, progress=lambda: bar.update(2)
            )
            maps = values.pop("maps")
            if name == first:
                known = maps[: len(random_part)]
            summary = statistics.summarize(values)
            rows.append(
                {
                    "method": method,
                    "model": name,
                    "ours": method == "hirescam" and config[name].method == "guided",
                    "ms_per_image": 1e3 * clock.seconds / len(explained),
                    "undefined_maps": int((~np.isfinite(maps).all(axis=(1, 2))).sum()),
                    "measures": summary,
                }
            )
            per_example |= {
                f"{method}/{name}/{key}": value for key, value in values.items()
            }
        other = splits.map_split(
            config,
            random_part,
            lambda batch, fn=fn: {"maps": fn(all_models[None], moments[None], batch)},
            progress=lambda: bar.update(2),
        )
        change = statistics.map_change(known, other["maps"])
        sanity[method] = sanity_verdict(change)
        per_example[f"{method}/sanity"] = change
    return rows, sanity, per_example


def sanity_verdict(correlations) -> dict:
    """Whether maps follow the weights: they fail if random weights leave them alike.

    Args:
      correlations: ``statistics.map_change`` [N] of a trained and a random network.

    Returns:
      {mean, low, high, n, passed}; passed if the mean is below ``SANITY_LIMIT``.
    """
    known = np.isfinite(correlations)
    interval = metrics.mean_and_interval(correlations, known)
    return {
        **interval._asdict(),
        "n": int(known.sum()),
        "passed": bool(interval.mean < SANITY_LIMIT),
    }


def _score_maps(variables, batch_and_maps, *, model, image_stats, matched_area):
    batch, maps = batch_and_maps
    return measure_maps(
        variables,
        batch,
        maps,
        model=model,
        image_stats=image_stats,
        matched_area=matched_area,
    )


class _Clock(contextlib.AbstractContextManager):
    """Adds up the seconds spent inside."""

    seconds = 0.0

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        self.seconds += time.perf_counter() - self._start
