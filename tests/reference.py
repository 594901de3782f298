"""The formulas once more, in plain NumPy float64: slow, naive, to compare with."""

import numpy as np


def sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, np.float64)))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def blur(x, sigma):
    """[H, W, K] smoothed cell by cell with a reflected border; sigma None: x."""
    x = np.asarray(x, np.float64)
    if sigma is None:
        return x
    radius = int(round(2 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(x, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    out = np.zeros_like(x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            window = padded[i : i + 2 * radius + 1, j : j + 2 * radius + 1]
            out[i, j] = np.einsum("a,b,abk->k", taps, taps, window)
    return out


def capacity(alpha, features, mean, std, active, *, sigma, min_std=0.01):
    """Nats per element [H, W, K] of one image, with 1 - lambda kept exact."""
    rest = blur(sigmoid(-np.asarray(alpha, np.float64)), sigma)
    features, mean, std = (np.asarray(x, np.float64) for x in (features, mean, std))
    r = (features - mean) / np.maximum(std, min_std)
    nats = -0.5 * (1 + np.log(rest**2) - ((1 - rest) * r) ** 2 - rest**2)
    return np.where(active, nats, 0.0)


def pooled_head_moments(alpha, features, mean, std, active, kernel, bias, *, sigma):
    """Mean [C] and covariance [C, C] of the noisy logits of a pooled linear head."""
    rest = blur(sigmoid(-np.asarray(alpha, np.float64)), sigma)
    features, mean, std, kernel, bias = (
        np.asarray(x, np.float64) for x in (features, mean, std, kernel, bias)
    )
    z_mean = np.where(active, (1 - rest) * features + rest * mean, 0.0)
    z_variance = np.where(active, (rest * std) ** 2, 0.0)
    cells = z_mean.shape[0] * z_mean.shape[1]
    channel_variance = z_variance.sum((0, 1)) / cells**2
    return (
        z_mean.mean((0, 1)) @ kernel + bias,
        kernel.T @ np.diag(channel_variance) @ kernel,
    )


def resize_reflecting(maps, size):
    """Bilinear half-pixel resize of [H, W] that sees a reflected border, not a clamp.

    Doubling sizes only: output pixel i sits at (i + 1/2) / 2 - 1/2.
    """
    maps = np.pad(np.asarray(maps, np.float64), 1, mode="reflect")
    rows, columns = (
        (np.arange(n) + 0.5) * (m - 2) / n - 0.5 + 1
        for n, m in zip(size, maps.shape, strict=True)
    )
    i, j = np.floor(rows).astype(int), np.floor(columns).astype(int)
    u, v = (rows - i)[:, None], (columns - j)[None, :]
    return (
        (1 - u) * (1 - v) * maps[np.ix_(i, j)]
        + u * (1 - v) * maps[np.ix_(i + 1, j)]
        + (1 - u) * v * maps[np.ix_(i, j + 1)]
        + u * v * maps[np.ix_(i + 1, j + 1)]
    )


def pooled_linear_saliency(features, kernel, label):
    """[H, W] of one image: dy/dA_k is kernel[k, label] / (H W) in every cell."""
    features = np.asarray(features, np.float64)
    cells = features.shape[0] * features.shape[1]
    return features @ np.asarray(kernel, np.float64)[:, label] / cells


def saliency_cross_entropy(saliency, target, *, kind, floor=1e-3):
    saliency, target = (np.asarray(x, np.float64) for x in (saliency, target))
    if kind == "categorical":
        s = saliency + floor * saliency.mean()
        t = target + floor * target.mean()
        return -np.sum(t / t.sum() * np.log(s / s.sum()))
    s = np.clip(floor + (1 - 2 * floor) * saliency / saliency.max(), 0, 1)
    t = target / target.max()
    return -np.mean(t * np.log(s) + (1 - t) * np.log(1 - s))


def saliency_suppression(saliency_c, saliency_p, mask=1.0):
    c, p = (np.asarray(x, np.float64) for x in (saliency_c, saliency_p))
    return np.sum(np.minimum(c, p) * mask) / np.sum(c + p)


def runner_up_excess(saliency_c, saliency_p, *, fraction=0.25):
    c, p = (np.asarray(x, np.float64) for x in (saliency_c, saliency_p))
    return np.sum(p[p > fraction * c]) / np.sum(c + p)


def soft_mask(saliency, *, omega=100.0, threshold=0.55):
    saliency = np.asarray(saliency, np.float64)
    return sigmoid(omega * (saliency - threshold * saliency.max()))


def feature_kl(features, target, *, over="all", floor=0.1):
    a, b = (np.asarray(x, np.float64) for x in (features, target))
    level = floor * a.mean()
    axes = (0, 1, 2) if over == "all" else (0, 1)
    p = (a + level) / (a + level).sum(axes, keepdims=True)
    q = (b + level) / (b + level).sum(axes, keepdims=True)
    return np.mean(np.sum(p * np.log(p / q), axis=axes))


def weighted_moments(batches, weights):
    """Mean, summed squared deviation and count of examples weighted per batch."""
    x = np.concatenate([np.asarray(b, np.float64) for b in batches])
    w = np.concatenate(
        [np.full(len(b), v) for b, v in zip(batches, weights, strict=True)]
    )
    w = w.reshape(-1, *[1] * (x.ndim - 1))
    mean = (w * x).sum(0) / w.sum()
    return mean, (w * (x - mean) ** 2).sum(0), w.sum(), (w * (x != 0)).sum(0)
