"""The options of the bottleneck, and the bounds of what it computes with."""

import dataclasses

# Features, their means and deviations end here, and min_std begins there: a squared
# ratio of the two is finite, and so is the sum of millions of them.
MAX_FEATURE = 1e9
MIN_STD = 1e-6


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """Options of the attribution; the defaults are those of IBA's reference code.

    Attributes:
      beta: weight of the mean capacity against the cross-entropy, >= 0.
      num_steps: Adam steps on alpha, >= 1. At the last layer 10 steps do not converge
        there (alpha moves by about 1 a step, from 5); 20 do.
      num_samples: noise draws per step, >= 1.
      learning_rate: of Adam, > 0.
      blur_sigma: standard deviation in cells of the Gaussian that smooths lambda, > 0,
        or None for no smoothing.
      initial_alpha: lambda starts at sigmoid(initial_alpha).
      min_std: features that vary less are treated as varying this much, >= 1e-6.
      active_threshold: for ``feature_stats.moments``; not read by ``attribute``.
      relu: clip the noisy features at zero before the head.
      noise_scale: the head sees noise of so many standard deviations, > 0. Below 1 a
        gradient from few samples varies less; the capacity is still that of full noise.
    """

    beta: float = 10.0
    num_steps: int = 10
    num_samples: int = 10
    learning_rate: float = 1.0
    blur_sigma: float | None = 1.0
    initial_alpha: float = 5.0
    min_std: float = 0.01
    active_threshold: float = 0.01
    relu: bool = False
    noise_scale: float = 1.0

    def __post_init__(self):
        for name in ("num_steps", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("learning_rate", "noise_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        if not MIN_STD <= self.min_std <= MAX_FEATURE:
            raise ValueError(
                f"min_std={self.min_std}: must be from {MIN_STD} to {MAX_FEATURE}"
            )
        if self.beta < 0:
            raise ValueError(f"beta={self.beta}: must not be negative")
        if self.blur_sigma is not None and not self.blur_sigma > 0:
            raise ValueError(
                f"blur_sigma={self.blur_sigma}: must be positive, or None for no blur"
            )


# At an inner layer: eight passes behind it for one map, where the default takes ninety.
FAST = BottleneckConfig(
    num_steps=9, num_samples=1, learning_rate=1.5, initial_alpha=3.0, noise_scale=0.7
)
