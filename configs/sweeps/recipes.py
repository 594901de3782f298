"""Which recipe works, and which part of it: every answer on digits, for five seeds.

    python -m train.sweep configs/sweeps/recipes.py

Every phase but the first and those from scratch starts from the weights of "plain" and
sees the same batches. "guided" is the quickstart's recipe; what each of the others
changes against it stands beside it.
"""

from configs import quickstart
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"
CONTROLS = {name: "scratch_control" for name in ("scratch", "scratch_at_once")}
# Measured on the test split too; the parts were judged on validation.
FINAL = (
    "control",
    "literal",
    "saliency_guided",
    "icasc",
    "guided",
    "oracle",
    "scratch_control",
    "scratch",
)


def get_config():
    config = quickstart.get_config()
    variants.quiet(config)
    config.phases = ("plain", "control")

    def add(name, base="guided", **fields):
        variants.add(config, name, base, **fields)

    # The rivals: Algorithm 1 as printed with IBA's own options (configs/poster.py),
    # Saliency Guided Training, ICASC.
    variants.add_literal(config)
    variants.add_rivals(config)
    # From scratch, for as many steps as "plain" and "control" have together.
    add("scratch_control", "plain", num_epochs=10.0)

    # The recipe, and the true mask for a teacher.
    config.phases = (*config.phases, "guided")
    add("oracle", teacher="mask")
    return config
