"""Three tries for each method of shortcut_rows.py, from scratch, on validation only.

    python -m train.sweep configs/sweeps/shortcut_settings.py --num-perturbed 0 \
        --columns accuracy worst_class box_share

The phases are named after the row and the try. A row's setting is the try of the best
accuracy on the validation split, where the cue is as at test; that is generous, to all
rows alike.
"""

from configs.sweeps import shortcut_rows, variants

SEEDS = (10, 11)
CONTROL = "plain"
TRIES = {
    "rrr": ("weight", (1e-2, 1e-1, 1.0)),
    "energy": ("weight", (0.3, 1.0, 3.0)),
    "guided": ("mu", (5.0, 20.0, 80.0)),
    "masks_100": ("mu", (5.0, 20.0, 80.0)),
    "saliency_guided": ("weight", (0.3, 1.0, 3.0)),
    "rand_r4": ("weight", (1e-1, 1.0, 10.0)),
}


def get_config(cue: str = "decoy"):
    config = shortcut_rows.base(cue)
    for name, (field, values) in TRIES.items():
        for number, value in enumerate(values):
            phase = shortcut_rows.make_phase(config, name, **{field: value})
            variants.put(config, f"{name}_try{number}", phase)
    return config
