"""Attribution methods side by side, and whether their maps follow the weights."""

import contextlib
import time

import jax
import numpy as np

from ibsgl_jax import metrics
from train import devices
from train.measure import plan, splits, statistics
from train.measure.batch import measure_maps, method_maps
from train.method.build import make_optimizer, make_schedule
from train.method.state import create_state

# A map that ranks the pixels like this one under random weights explains no model.
SANITY_LIMIT = 0.5


def evaluate_methods(run, models, sources, options, *, moments_of, kept, bar):
    """The table of methods, the check by random weights and the per-example values.

    Args:
      run: with its data.
      models: dict phase -> variables; None: those of ``random_network``.
      sources: ``plan.parts_of``.
      options: ``plan.Options``.
      moments_of: function of a key of models: ``feature_stats.moments``.
      kept: ``parts.Parts``.
      bar: of progress, in passes of an image.

    Returns:
      (rows, dict method -> sanity, dict of per-example arrays).
    """
    rows, sanity, per_example = [], {}, {}
    phases = [name for name in models if name is not None]
    for method in options.methods:
        bar.set_postfix_str(method)
        name = f"method {method}"
        new = not kept.has(name)
        values = kept.get(
            name,
            lambda method=method: _measure_method(
                run, models, sources, method, moments_of
            ),
        )
        passes = plan.method_passes(method)
        number = len(phases) * len(sources["methods"]) + len(sources["sanity"])
        bar.advance(passes * number, new=new)
        for phase in phases:
            prefix = f"{phase}: "
            found = {
                key.removeprefix(prefix): value
                for key, value in values.items()
                if key.startswith(prefix)
            }
            about = {key: found.pop(key).item() for key in ("ms", "undefined")}
            rows.append(
                {
                    "method": method,
                    "model": phase,
                    "ours": method == "hirescam"
                    and run.config[phase].method == "guided",
                    "ms_per_image": about["ms"],
                    "undefined_maps": about["undefined"],
                    "measures": statistics.summarize(found, intervals=True),
                }
            )
            per_example |= {f"{method}/{phase}/{k}": v for k, v in found.items()}
        sanity[method] = sanity_verdict(values["sanity"])
        per_example[f"{method}/sanity"] = values["sanity"]
    return rows, sanity, per_example


def random_network(run):
    """The variables of the run's model with random weights that no phase had."""
    return create_state(
        jax.random.key(run.config.seed + 1),
        run.model,
        make_optimizer(run.config.optimizer, make_schedule(1.0, 2, 0)),
        run.config.image_size,
    ).variables


def _measure_method(run, models, sources, method, moments_of):
    """Per phase the measures of a method's maps, and how random weights change them.

    Returns:
      dict of arrays: "PHASE: MEASURE", "PHASE: ms", "PHASE: undefined", "sanity".
    """
    config, source = run.config, sources["methods"]
    score_fn = devices.compiled(
        _score_maps, config, run.model, matched_area=config.matched_area
    )
    maps_fn = devices.compiled(
        method_maps, config, run.model, num_carried=2, method=method
    )
    # Only the bottleneck asks for them, and they cost many passes.
    moments = {name: moments_of(name) if method == "ib" else None for name in models}
    first = next(iter(models))
    batch = devices.shard(next(iter(splits.placed_batches(config, source))))
    jax.block_until_ready(maps_fn(models[first], moments[first], batch))  # compile
    values = {}
    for name in filter(None, models):
        clock = _Clock()

        def score(batch, name=name, clock=clock):
            with clock:
                maps = jax.block_until_ready(
                    maps_fn(models[name], moments[name], batch)
                )
            return {**score_fn(models[name], (batch, maps)), "maps": maps}

        found = splits.map_split(config, source, score)
        maps = found.pop("maps")
        if name == first:
            known = maps[: len(sources["sanity"])]
        values |= {f"{name}: {key}": value for key, value in found.items()}
        values[f"{name}: ms"] = np.float64(1e3 * clock.seconds / len(source))
        undefined = ~np.isfinite(maps).all(axis=(1, 2))
        values[f"{name}: undefined"] = np.int64(undefined.sum())
    other = splits.map_split(
        config,
        sources["sanity"],
        lambda batch: {"maps": maps_fn(models[None], moments[None], batch)},
    )
    values["sanity"] = statistics.map_change(known, other["maps"])
    return values


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
