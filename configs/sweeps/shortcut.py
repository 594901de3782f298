"""Training data whose background tells the class, judged where it does not.

    python -m train.sweep configs/sweeps/shortcut.py

"plain" learns from sound data. The other phases learn from photographs that agree with
the class in nine of ten images, and are measured on images where they do not.
"""

from configs import quickstart
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"
CONTROLS = {name: "scratch_control" for name in ("scratch", "scratch_taught")}
SHORTCUT = "photo_digits/shortcut"


def get_config():
    config = quickstart.get_config()
    variants.quiet(config)
    for phase in (config.control, config.guided):
        phase.dataset = SHORTCUT
    # Fine-tuning the sound network: its own bottleneck, that of the sound network as it
    # was, the true mask.
    variants.add(config, "frozen_teacher", teacher="plain")
    variants.add(config, "oracle", teacher="mask")
    # From scratch: alone, and taught by the sound network.
    scratch = dict(
        init="random",
        num_epochs=config.plain.num_epochs,
        learning_rate=config.plain.learning_rate,
    )
    variants.add(config, "scratch_control", "control", **scratch)
    variants.add(config, "scratch", release=1 / 7, **scratch)
    variants.add(config, "scratch_taught", teacher="plain", release=1 / 7, **scratch)
    return config
