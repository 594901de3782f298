"""The run's own table, at the end of training."""

from pathlib import Path

import jax

from train.data import dataset
from train.files import write_json
from train.measure import splits, statistics
from train.show import figures, sanity, sanity_several, tables


def evaluate_phases(config, model, states, data, workdir) -> dict:
    """Measure every phase on the test split and write what there is to see.

    Args:
      config, model: the run's; the model without an axis name.
      states: dict phase name -> TrainState.
      data: ``dataset.Data``.
      workdir: gets results.json and before_after.png (from process 0).

    Returns:
      dict phase name -> dict of means (see ``batch.measure``).
    """
    judge, examine = _judge(config, data)
    results, checks = {}, {}
    for name, state in states.items():
        values = splits.measure_split(config, model, state.variables, data.test)
        checks[name] = examine(values)
        keys = [k for k, v in values.items() if v.ndim == 1 and k != "predicted"]
        keys += ["mean_ap", "top_label"]  # of several labels
        summary = statistics.summarize(values, keys=keys)
        results[name] = {key: entry["mean"] for key, entry in summary.items()}
    if jax.process_index() == 0:
        workdir = Path(workdir)
        names = data.class_names or [f"class {i}" for i in range(data.num_classes)]
        record = {
            "split": config.test_split,
            "num_images": len(data.test),
            "class_names": list(names),
            "phases": results,
            "sanity": {
                name: {**check, "sentence": judge.sentence(name, check, names)}
                for name, check in checks.items()
            },
        }
        write_json(workdir / "results.json", record)
        print(tables.phase_table(results))
        print("", judge.text(checks, names), sep="\n", flush=True)
        if config.picture_phases:
            phases = figures.picture_phases(config, states)
            # Not the first pictures of a folder, which are of one class.
            shown = data._replace(test=dataset.mixed(data.test))
            figures.write_before_after(
                config, model, states, shown, workdir, phases=phases
            )
    return results


def _judge(config, data):
    """The first sanity check, and its ``examine`` as a function of measured values."""
    if config.link == "sigmoid":
        return sanity_several, lambda values: sanity_several.examine(
            values["logits"], values["positives"], values["blank"]
        )
    labels = [int(data.test[i]["label"]) for i in range(len(data.test))]
    return sanity, lambda values: sanity.examine(
        labels, values["predicted"], values["blank"], data.num_classes
    )
