"""What moves the wrong class's map away, with the squared CAM as the teacher: digits.

    python -m train.sweep configs/sweeps/suppressions.py

"excess" is the default's suppression; "contrast" has none, but takes a share of the
wrong class's evidence off the map that follows the teacher. Read the mass ratio beside
box share: what is wanted is less of L^p where the object is, while L^c keeps its mass.
"""

from configs import quickstart
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"


def get_config():
    config = quickstart.get_config()
    variants.quiet(config)
    config.phases = ("plain", "control")
    teacher = dict(teacher="hirescam", teacher_power=2.0)
    variants.add(config, "excess", **teacher)
    variants.add(config, "none", **teacher, guidance__suppression_weight=0.0)
    for name, kind in (
        ("mass", "runner_up_mass"),
        ("cosine", "runner_up_cosine"),
        ("overlap", "overlap"),
    ):
        variants.add(config, name, **teacher, guidance__suppression=kind)
    for name, share in (("contrast_03", 0.3), ("contrast_1", 1.0)):
        alone = dict(guidance__suppression_weight=0.0, guidance__contrast=share)
        variants.add(config, name, **teacher, **alone)
    return config
