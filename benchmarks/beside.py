"""python -m benchmarks.beside RUN/PHASE ... --out FILE.png: maps of several networks.

The first images of the test split as each network sees them: maps of the true class,
or ("runner_up") of the strongest wrong one on the scale of the true one's, and what the
network says. The runs must be of one data set.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import feature_stats, models, trained
from train import command
from train.arguments import Parser, at_least
from train.measure.batch import method_maps
from train.method import answers
from train.method.step import normalize_images
from train.run import saved_run
from train.show import figures

METHODS = {
    "hirescam": "HiResCAM",
    "ib": "bottleneck",
    "runner_up": "of the strongest other",
}


def explain(network, batch, methods):
    """(probabilities [N, C], dict method -> maps [N, H, W]) of a ``TrainedModel``."""
    stats = dict(mean=network.preprocessing.mean, std=network.preprocessing.std)
    moments = feature_stats.moments(network.stats)

    @jax.jit
    def explain_fn(variables, batch):
        images = normalize_images(batch["image"], **stats)
        features = models.make_features_fn(network.model, variables)(images)
        logits = models.make_head_fn(network.model, variables)(features)
        bound = dict(model=network.model, image_stats=stats)
        found = {}
        for name in {"hirescam", *methods}:
            shown, method = batch, name
            if name == "runner_up":
                shown = batch | {"label": answers.runner_up(logits, batch)}
                method = "hirescam"
            found[name] = method_maps(variables, moments, shown, method=method, **bound)
        return answers.probabilities(logits, batch), found

    places = jnp.arange(len(batch["label"]))
    return jax.device_get(explain_fn(network.variables, {**batch, "place": places}))


@command.run
def main(argv=None):
    parser = Parser(
        prog="python -m benchmarks.beside", description=__doc__.splitlines()[0]
    )
    parser.add_argument("networks", nargs="+", metavar="RUN/PHASE")
    parser.add_argument("--names", nargs="+", help="of the networks, in the picture")
    parser.add_argument("--images", type=at_least(1), default=4)
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=["hirescam", "ib"]
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    names = args.names or args.networks
    if len(names) != len(args.networks):
        parser.error(f"{len(names)} --names of {len(args.networks)} networks")
    if not (args.out.suffix == ".png" and args.out.parent.is_dir()):
        parser.error(f"--out {args.out}: give FILE.png in a folder that is there")
    first, seen = None, []
    for path in map(Path, args.networks):
        run = saved_run.Run(path.parent, phases=[path.name])
        batch = figures.first_images(run.config, run.data.test, args.images)
        first = first or batch
        if not all(np.array_equal(batch[k], first[k]) for k in ("image", "label")):
            parser.error(f"{path} has other test images than {args.networks[0]}")
        file = path.parent / "models" / f"{path.name}.npz"
        if not file.is_file():
            parser.error(f"no file {file}: the phase is not trained to its end")
        seen.append(explain(trained.load(file), batch, args.methods))
    figure = draw(first, seen, names, args.methods)
    print(figures.save(figure, args.out))
    return 0


def draw(batch, seen, names, methods):
    """A figure: a row for each image, a column for each network and method."""
    number, columns = len(batch["image"]), 1 + len(seen) * len(methods)
    figure, axes = figures.grid(number, columns)
    for row, line in enumerate(axes):
        label = int(batch["label"][row])
        for axis in line:
            figures.show_image(axis, batch, row, title="")
        line[0].set_ylabel(label, fontsize=9)
        rest = iter(line[1:])
        for name, (probs, maps) in zip(names, seen, strict=True):
            for method in methods:
                axis, heat = next(rest), np.asarray(maps[method][row])
                scale = maps["hirescam"][row] if method == "runner_up" else heat
                figures.show_heat(axis, heat, np.asarray(scale))
                if row == 0:
                    axis.set_title(f"{name}\n{METHODS[method]}", fontsize=9)
                says, true = probs[row].argmax(), probs[row][label]
                axis.set_xlabel(f"says {says}\nP of the true {true:.2f}", fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
