"""One label per image, or several: what loss, measures and guidance make of a batch.

A batch with ``positives`` [N, C] is of images with any number of labels, each under a
sigmoid of its own (``config.link="sigmoid"``), and its ``label`` [N] is the one that is
explained. In any other ``label`` is all that an image has, under a softmax. Which it is
is known before a step is compiled, and the second costs no operation more.
"""

import jax.numpy as jnp

from ibsgl_jax import metrics, saliency


def link_of(batch) -> str:
    """How the logits become probabilities, of ``predictions.LINKS``."""
    return "sigmoid" if "positives" in batch else "softmax"


def all_of(batch):
    """All labels of each image, as the library takes them: [N], or [N, C] in {0, 1}."""
    return batch.get("positives", batch["label"])


def scores(logits, batch) -> dict:
    """What a batch's logits [N, C] are worth: dict of accuracy, nll, ... [N]."""
    labels = all_of(batch)
    found = {
        "accuracy": metrics.accuracy(logits, labels),
        "nll": metrics.nll(logits, labels, link=link_of(batch)),
    }
    if labels.ndim == 2:
        found["label_accuracy"] = metrics.label_accuracy(logits, labels)
    return found


def probability(logits, batch, classes=None):
    """Of classes [N], by the batch's link; of the labels shown if None: [N]."""
    classes = batch["label"] if classes is None else classes
    return metrics.probability(logits, classes, link=link_of(batch))


def probabilities(logits, batch):
    """Of all classes, [N, C]."""
    return metrics.probabilities(logits, link=link_of(batch))


def runner_up(logits, batch):
    """The strongest class that is no label of the image, int32 [N]."""
    return saliency.runner_up(logits, all_of(batch))


def counted(values, batch):
    """bool or 0/1 [N], and 0 for an image without a label: nothing of it is shown."""
    if "positives" not in batch:
        return values
    return values * jnp.any(batch["positives"] > 0, axis=1).astype(values.dtype)


def shown(values: dict, batch) -> dict:
    """dict of floats [N, ...], NaN for an image without a label."""
    return _where(values, batch, lambda there: jnp.any(there, axis=1))


def rivalled(values: dict, batch) -> dict:
    """dict of floats [N, ...], NaN for an image that has every label: no runner-up."""
    return _where(values, batch, lambda there: ~jnp.all(there, axis=1))


def _where(values, batch, known_fn):
    if "positives" not in batch:
        return values
    known = known_fn(batch["positives"] > 0)
    return {
        key: jnp.where(known.reshape(-1, *[1] * (value.ndim - 1)), value, jnp.nan)
        for key, value in values.items()
    }
