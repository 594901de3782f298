"""Pictures of what a run learnt.

Every picture takes the first images of the split, unselected.
"""

import functools
import itertools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import bottleneck, metrics, perturbation, saliency
from ibsgl_jax.app.drawing import NEGLIGIBLE_BITS
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.models import make_features_fn, make_head_fn
from train.data import dataset
from train.measure import splits
from train.measure.batch import DELETED, black_pixel, class_maps, make_prob_fn
from train.method import answers
from train.method.step import normalize_images
from train.show.names import class_names, short

CURVE_STEPS = 20  # of the deletion curve


def picture_phases(config, states) -> tuple[str, str]:
    """The phases that stand for before and after: the config's, of those there are."""
    known = [name for name in config.picture_phases if name in states]
    names = known if len(known) == 2 else list(states)
    return names[0], names[-1]


def write_before_after(
    config, model, states, data, workdir, *, phases, num_statistics=1024
) -> Path:
    """before_after.png: the first test images and their maps in two phases.

    Columns: input with the true box; L^c and L^p of the first of ``phases``; its
    bottleneck map of the true class; L^c and L^p of the second. Maps of one image share
    a scale per phase, so that L^p shows its strength; a bottleneck map of next to no
    bits is faint, and says so.
    ``num_statistics`` training images give the bottleneck its statistics.
    """
    before, after = phases
    batch = first_images(config, data.test, config.picture_rows)
    maps = _maps_of_phases(
        config, model, states, (before, after), batch, data.train, num_statistics
    )
    names = class_names(data)
    columns = [
        ("input", None, None),
        (f"$L^c$ {before}", before, "c"),
        (f"$L^p$ {before}", before, "p"),
        (f"$L^{{ib}}$ {before}", before, "ib"),
        (f"$L^c$ {after}", after, "c"),
        (f"$L^p$ {after}", after, "p"),
    ]
    figure, axes = grid(len(batch["image"]), len(columns))
    for row in range(len(axes)):
        for axis, (title, phase, kind) in zip(axes[row], columns, strict=True):
            show_image(axis, batch, row, title=title if row == 0 else None)
            if phase is None:
                axis.set_ylabel(short(names[batch["label"][row]]), fontsize=9)
                continue
            values = maps[phase]
            bits = values["bits"][row]
            show_heat(
                axis,
                values[kind][row],
                values["c" if kind == "p" else kind][row],
                strength=bits / NEGLIGIBLE_BITS if kind == "ib" else 1.0,
            )
            if kind == "ib":
                text = f"{bits:.1e} bits: negligible"
                if bits >= NEGLIGIBLE_BITS:
                    text = f"{bits:.3g} bits"
                axis.set_xlabel(text, fontsize=8)
            if kind == "c":
                predicted, probability = values["top"][row], values["prob_c"][row]
                axis.set_xlabel(
                    f"says {short(names[predicted])}\nP of the true {probability:.2f}",
                    fontsize=8,
                )
    return save(figure, Path(workdir) / "before_after.png")


def write_suppression(
    config, model, states, data, workdir, phases, *, num_statistics=1024
) -> Path:
    """suppression.png: L^c, L^p and their overlap min(L^c, L^p), in two phases.

    Under each input stand four scores: the probabilities of c and of p, the runner-up
    before, each before and after. The paper prints four numbers there without a word;
    this is how we read them. Under the overlap stands ``metrics.overlap``. The maps of
    an image share a scale per phase.
    """
    before = phases[0]
    batch = first_images(config, data.test, 4)
    maps = _maps_of_phases(
        config, model, states, phases, batch, data.train, num_statistics
    )
    names = class_names(data)
    columns = [("input", None, None)] + [
        (f"{title} {phase}", phase, kind)
        for phase in phases
        for title, kind in (("$L^c$", "c"), ("$L^p$", "p"), ("overlap", "both"))
    ]
    figure, axes = grid(len(batch["image"]), len(columns), foot=0.15)
    for row in range(len(axes)):
        for axis, (title, phase, kind) in zip(axes[row], columns, strict=True):
            show_image(axis, batch, row, title=title if row == 0 else None)
            label = batch["label"][row]
            if phase is None:
                probs = [maps[name]["probs"][row] for name in phases]
                lines = [
                    f"P({name}={short(names[number], 12)})  {probs[0][number]:.3f}"
                    f" → {probs[1][number]:.3f}"
                    for name, number in (
                        ("c", label),
                        ("p", maps[before]["other"][row]),
                    )
                ]
                axis.set_xlabel("\n".join(lines), fontsize=8)
                continue
            values = maps[phase]
            show_heat(axis, values[kind][row], values["c"][row])
            score = {
                "c": f"P {values['prob_c'][row]:.3f}",
                "p": f"{short(names[values['other'][row]])}, "
                f"P {values['prob_p'][row]:.3f}",
                "both": f"overlap {values['overlap'][row]:.3f}",
            }[kind]
            axis.set_xlabel(score, fontsize=8)
    return save(figure, Path(workdir) / "suppression.png")


def write_deletion(config, model, states, data, workdir, phases) -> Path:
    """deletion.png: images with 30, 60 and 90 % of their pixels deleted, and the curve.

    The most salient pixels of L^c go first and become black; P is the label's
    probability. One row per image and phase.
    """
    batch = first_images(config, data.test, 3)
    images = normalize_images(batch["image"], **dataset.image_stats(config))
    labels, names = batch["label"], class_names(data)
    black = black_pixel(dataset.image_stats(config))

    @functools.partial(jax.jit, static_argnames="fractions")
    def deleted(variables, fractions):
        maps = class_maps(
            variables, batch, model=model, image_stats=dataset.image_stats(config)
        )
        prob_fn = make_prob_fn(model, variables, batch)
        seen = [
            perturbation.delete_pixels(images, maps, black, fraction=fraction)
            for fraction in fractions
        ]
        curve = perturbation.deletion_insertion(
            prob_fn, images, maps, black, num_steps=CURVE_STEPS
        )
        return jnp.stack(seen), jnp.stack([prob_fn(x) for x in seen]), curve

    figure, axes = grid(2 * len(labels), len(DELETED) + 1)
    for number, phase in enumerate(phases):
        seen, probs, curve = jax.device_get(deleted(states[phase].variables, DELETED))
        pictures = _to_pixels(seen, **dataset.image_stats(config))
        for image in range(len(labels)):
            row = axes[2 * image + number]
            for column, fraction in enumerate(DELETED):
                axis = row[column]
                axis.set_xticks([])
                axis.set_yticks([])
                axis.imshow(pictures[column, image], interpolation="nearest")
                axis.set_xlabel(f"P = {probs[column, image]:.3f}", fontsize=9)
                if image == number == 0:
                    title = f"{fraction:.0%} deleted" if fraction else "input"
                    axis.set_title(title, fontsize=11)
            row[0].set_ylabel(f"{short(names[labels[image]])}\n{phase}", fontsize=9)
            axis = row[-1]
            area = curve.deletion_auc[image]
            axis.plot(curve.fractions, curve.deletion[image], color=f"C{number}")
            axis.fill_between(
                curve.fractions, curve.deletion[image], alpha=0.15, color=f"C{number}"
            )
            axis.set_title(f"AUC {area:.3f}", fontsize=9)
            axis.set_ylim(0, 1.02)
            axis.set_xlim(0, 1)
            axis.set_xticks([0, 0.3, 0.6, 0.9])
            axis.set_yticks([0, 0.5, 1])
            axis.tick_params(labelsize=7)
            axis.set_box_aspect(1)
    return save(figure, Path(workdir) / "deletion.png")


def overlay(image, heat, *, bbox=None, side: int = 144):
    """One image under its map, as uint8 [side, side', 3] for a gallery.

    Args:
      image: uint8 [H, W, 3].
      heat: [H, W] in [0, 1], or None for the image alone.
      bbox: ymin, xmin, ymax, xmax in [0, 1], or None.
      side: pixels of the height of the result.
    """
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    height, width = image.shape[:2]
    size = (max(1, round(side * width / height)), side)
    enlarging = side >= height
    kind = Image.Resampling.NEAREST if enlarging else Image.Resampling.BOX
    pixels = np.asarray(Image.fromarray(image).resize(size, kind), np.float32)
    if heat is not None:
        heat = Image.fromarray(np.asarray(heat, np.float32))
        heat = np.clip(heat.resize(size, Image.Resampling.BILINEAR), 0, 1)
        colours = colormaps["inferno"](heat)[..., :3] * 255
        alpha = (0.25 + 0.6 * heat)[..., None]
        pixels = alpha * colours + (1 - alpha) * pixels
    picture = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    if bbox is not None:
        ymin, xmin, ymax, xmax = np.asarray(bbox) * np.array([*size[::-1], *size[::-1]])
        if xmax > xmin and ymax > ymin:
            ImageDraw.Draw(picture).rectangle(
                [xmin, ymin, xmax - 1, ymax - 1], outline=(255, 255, 255)
            )
    return np.asarray(picture)


def first_images(config, source, number):
    """The first images; where they have several labels or none, those that have one."""
    if "positives" in source[0]:
        labelled = (i for i in range(len(source)) if source[i]["positives"].any())
        chosen = list(itertools.islice(labelled, number))
        source = dataset.Examples(source, chosen or [0])
    number = min(number, len(source))
    batch = dataset.eval_batches(config, source, shard=(0, 1))[0]
    return {k: v[:number] for k, v in batch.items()}


def _maps_of_phases(
    config, model, states, phases, batch, train_source, num_statistics
) -> dict:
    """Per phase L^c, L^p, their minimum and L^ib at image size, and what is said."""
    stats = dataset.image_stats(config)
    images = normalize_images(batch["image"], **stats)
    labels, size = jnp.asarray(batch["label"]), images.shape[1:3]

    @jax.jit
    def maps_of(variables, moments):
        features = make_features_fn(model, variables)(images)
        head_fn = make_head_fn(model, variables)
        logits = head_fn(features)
        # A single class has no rival; its map is zero.
        alone = logits.shape[-1] < 2
        other = labels if alone else answers.runner_up(logits, batch)
        maps = saliency.class_saliencies(
            head_fn, features, jnp.stack([labels, other], axis=1)
        )
        maps = maps.at[:, 1].multiply(0.0) if alone else maps
        attribution = bottleneck.attribute(
            jax.random.key(config.seed),
            head_fn,
            features,
            labels,
            moments,
            config=BottleneckConfig(num_steps=20),
            loss=answers.link_of(batch),
        )
        map_c = saliency.upsample(maps[:, 0], size)
        map_p = saliency.upsample(maps[:, 1], size)
        return {
            "c": map_c,
            "p": map_p,
            "both": jnp.minimum(map_c, map_p),
            "ib": saliency.upsample(attribution.saliency, size),
            "bits": jnp.sum(attribution.saliency, axis=(1, 2)),
            "top": jnp.argmax(logits, axis=-1),
            "other": other,
            "probs": answers.probabilities(logits, batch),
            "prob_c": answers.probability(logits, batch),
            "prob_p": answers.probability(logits, batch, other),
            "overlap": metrics.overlap(maps[:, 0], maps[:, 1]),
        }

    values = {}
    for phase in dict.fromkeys(phases):
        variables = states[phase].variables
        moments = splits.data_set_moments(
            config, model, variables, train_source, num_examples=num_statistics
        )
        values[phase] = jax.device_get(maps_of(variables, moments))
    return values


def _to_pixels(images, *, mean, std):
    return np.clip(images * np.asarray(std) + np.asarray(mean), 0, 1)


def grid(num_rows, num_columns, *, foot=0.0):
    """A figure and its axes [rows, columns], one for each image or map."""
    from matplotlib.figure import Figure

    size = 1.75 * num_columns, (1.9 + foot) * num_rows + 0.3
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def show_image(axis, batch, row, *, title):
    """An image of a batch, with the object's box where there is one."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.imshow(batch["image"][row], interpolation="nearest")
    if title:
        axis.set_title(title, fontsize=11)
    if "bbox" in batch:
        _draw_box(axis, batch["bbox"][row], batch["image"].shape[1:3])


def show_heat(axis, heat, scale, *, strength=1.0):
    """The map over the image, divided by the maximum of the map ``scale``.

    Below a strength of 1 it is as much fainter: a map of next to nothing is no colour,
    nor is one that is not finite.
    """
    heat, scale, strength = (
        np.nan_to_num(values, posinf=0.0, neginf=0.0)
        for values in (heat, scale, strength)
    )
    peak = scale.max()
    heat = np.clip(heat / peak if peak > 0 else heat, 0, 1) * np.clip(strength, 0, 1)
    axis.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.25 + 0.6 * heat)


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


def save(figure, path):
    """Writes a figure; returns the path."""
    with warnings.catch_warnings():
        # A class may be called by a sign that the font lacks: a box stands for it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, dpi=130)
    return path
