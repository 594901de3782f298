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

    def add(name, base="guided", **fields):
        variants.add(config, name, base, **fields)

    # Fine-tuning the sound network: its own bottleneck, the true mask.
    add("oracle", teacher="mask")
    # From scratch, with the cheap teacher at the last layer: nobody's, its own, that of
    # the sound network.
    scratch = dict(
        init="random",
        num_epochs=config.plain.num_epochs,
        learning_rate=config.plain.learning_rate,
    )
    add("scratch_control", "control", **scratch)
    scratch |= dict(release=1 / 7, mu_warmup_epochs=config.plain.num_epochs / 2)
    scratch |= variants.LAST
    add("scratch", **scratch)
    add("scratch_taught", **scratch | dict(teacher="plain"))
    return config
