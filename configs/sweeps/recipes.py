"""The recipes side by side, fine-tuned from the same plain network, for five seeds.

    python -m train.sweep configs/sweeps/recipes.py

Every phase but the first starts from the weights of "plain" and sees the same batches.
What each changes against "guided", the quickstart's recipe, stands beside it.
"""

import copy

from configs import quickstart
from configs.baselines import icasc, saliency_guided

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def get_config():
    config = quickstart.get_config()
    config.picture_phases = ()
    config.tensorboard = False

    def variant(name, **fields):
        phase = copy.deepcopy(config.guided)
        for path, value in fields.items():
            section, _, field = path.rpartition("__")
            (phase[section] if section else phase)[field] = value
        config[name] = phase

    # Algorithm 1 as printed, IBA's own options (configs/poster.py).
    variant(
        "literal",
        bottleneck__num_steps=10,
        bottleneck__num_samples=10,
        guidance__suppression="masked_overlap",
        guidance__step="plain",
        guidance__step_size=1.0,
    )
    # The teacher: IBA's ten steps; the true mask of the object.
    variant("ten_steps", bottleneck__num_steps=10)
    variant("oracle", teacher="mask")
    # The suppression: none; the printed formula; with the mask of its ancestor; with
    # the complement of the bottleneck's map.
    variant("no_suppression", guidance__suppression_weight=0.0)
    variant("overlap", guidance__suppression="overlap")
    variant("masked_overlap", guidance__suppression="masked_overlap")
    variant("background_overlap", guidance__suppression="background_overlap")
    # The rivals.
    same = {f: config.control[f] for f in ("init", "num_epochs", "learning_rate")}
    config.saliency_guided = saliency_guided.phase(**same)
    config.icasc = icasc.phase(**same)
    config.phases = (
        "plain",
        "control",
        "guided",
        "literal",
        "ten_steps",
        "oracle",
        "no_suppression",
        "overlap",
        "masked_overlap",
        "background_overlap",
        "saliency_guided",
        "icasc",
    )
    return config
