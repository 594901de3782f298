"""Pictures of what a run learnt. May import matplotlib, jax and ``train.evaluate``."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import bottleneck, saliency
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.models import make_features_fn, make_head_fn
from train import evaluate
from train.step import normalize_images


def write_before_after(config, model, states, data, workdir) -> Path:
    """before_after.png: the first test images and their maps in two phases.

    Columns: input with the true box; L^c and L^p of the first of
    ``config.picture_phases``; its bottleneck map of the true class; L^c and L^p of the
    second. Maps of one image share a scale per phase, so that L^p shows its strength.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    before, after = config.picture_phases
    num_rows = min(config.picture_rows, len(data.test))
    batches = evaluate.eval_batches(config, data.test, shard=(0, 1))
    batch = {k: v[:num_rows] for k, v in batches[0].items()}
    maps = {
        name: _maps(config, model, states[name].variables, batch, data)
        for name in (before, after)
    }
    columns = [
        ("input", None, None),
        (f"$L^c$ {before}", before, "c"),
        (f"$L^p$ {before}", before, "p"),
        (f"$L^{{ib}}$ {before}", before, "ib"),
        (f"$L^c$ {after}", after, "c"),
        (f"$L^p$ {after}", after, "p"),
    ]
    figure, axes = plt.subplots(
        num_rows,
        len(columns),
        figsize=(1.75 * len(columns), 1.9 * num_rows + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for row in range(num_rows):
        image = batch["image"][row]
        for axis, (title, phase, kind) in zip(axes[row], columns, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.imshow(image, interpolation="nearest")
            if row == 0:
                axis.set_title(title, fontsize=11)
            if "bbox" in batch:
                _draw_box(axis, batch["bbox"][row], image.shape[:2])
            if phase is None:
                axis.set_ylabel(f"class {batch['label'][row]}", fontsize=9)
                continue
            values = maps[phase]
            scale = values["c" if kind == "p" else kind][row].max()
            heat = values[kind][row] / scale if scale > 0 else values[kind][row]
            heat = np.clip(heat, 0, 1)
            axis.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.25 + 0.6 * heat)
            if kind == "c":
                predicted, probability = values["top"][row], values["prob"][row]
                axis.set_xlabel(
                    f"says {predicted}, p({batch['label'][row]}) {probability:.2f}",
                    fontsize=8,
                )
    path = Path(workdir) / "before_after.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _maps(config, model, variables, batch, data) -> dict:
    """L^c, L^p, L^ib at image size, predictions and probabilities, as NumPy."""
    moments = evaluate.data_set_moments(config, model, variables, data.train)

    @jax.jit
    def maps_of(images, labels):
        images = normalize_images(images, **evaluate.image_stats(config))
        features = make_features_fn(model, variables)(images)
        head_fn = make_head_fn(model, variables)
        logits, maps = saliency.logits_and_saliencies(
            head_fn,
            features,
            lambda logits: jnp.stack(
                [labels, saliency.runner_up(logits, labels)], axis=1
            ),
        )
        attribution = bottleneck.attribute(
            jax.random.key(config.seed),
            head_fn,
            features,
            labels,
            moments,
            config=BottleneckConfig(num_steps=20),
        )
        size = images.shape[1:3]
        prob = jax.nn.softmax(logits)
        return {
            "c": saliency.upsample(maps[:, 0], size),
            "p": saliency.upsample(maps[:, 1], size),
            "ib": saliency.upsample(attribution.saliency, size),
            "top": jnp.argmax(logits, axis=-1),
            "prob": jnp.take_along_axis(prob, labels[:, None], axis=1)[:, 0],
        }

    return jax.device_get(maps_of(batch["image"], batch["label"]))


def _draw_box(axis, bbox, size):
    from matplotlib.patches import Rectangle

    ymin, xmin, ymax, xmax = bbox * np.array([*size, *size])
    axis.add_patch(
        Rectangle(
            (xmin - 0.5, ymin - 0.5),
            xmax - xmin,
            ymax - ymin,
            fill=False,
            edgecolor="white",
            linewidth=1,
        )
    )
