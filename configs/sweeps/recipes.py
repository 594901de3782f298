"""Which recipe works, and which part of it: every answer on digits, for five seeds.

    python -m train.sweep configs/sweeps/recipes.py

Every phase but the first and those from scratch starts from the weights of "plain" and
sees the same batches. "guided" is the quickstart's recipe, "last" the same with the
cheap teacher at the last layer, in which the parts are exchanged one at a time.
"""

from configs import quickstart
from configs.sweeps import variants

SEEDS = (0, 1, 2, 3, 4)
CONTROL = "control"
CONTROLS = {"scratch": "scratch_control"}
# Measured on the test split too; the parts were judged on validation.
FINAL = (
    "control",
    "literal",
    "saliency_guided",
    "icasc",
    "guided",
    "oracle",
    "last",
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

    # The recipe; the true mask for a teacher; the bottleneck at the last layer, which
    # adds a quarter of a plain step.
    config.phases = (*config.phases, "guided")
    add("oracle", teacher="mask")
    add("last", **variants.LAST)

    # From random weights with the cheap teacher, mu growing for half of the time.
    add(
        "scratch",
        "last",
        init="random",
        num_epochs=10.0,
        learning_rate=config.plain.learning_rate,
        mu_warmup_epochs=5.0,
        release=0.1,
    )

    # The other parts, one at a time, with the cheap teacher. The teacher: its steps, a
    # frozen copy.
    add("ten_steps", "last", bottleneck__num_steps=10)
    add("frozen_teacher", "last", teacher="plain")
    # The losses and the step.
    add("bernoulli", "last", guidance__cross_entropy="bernoulli")
    add("spatial_kl", "last", guidance__kl_over="spatial")
    add("plain_step", "last", guidance__step="plain", guidance__step_size=1.0)
    add("half_mu", "last", mu=0.5 * config.guided.mu)
    # Whom, when and how.
    add("every_step", "last", every=1, mu=config.guided.mu / config.guided.every)
    add("always", "last", guidance__gate="always")
    add("no_release", "last", release=0.0)
    add("direct", "last", route="direct", mu=0.03 * config.guided.mu)

    # Suppression, with the cheap teacher: none; the runner-up's map made to turn away;
    # the printed formula, with the mask of its ancestor, with the complement of the
    # bottleneck's map.
    add("no_suppression", "last", guidance__suppression_weight=0.0)
    for kind in (
        "runner_up_cosine",
        "overlap",
        "masked_overlap",
        "background_overlap",
    ):
        add(kind, "last", guidance__suppression=kind)
    # IBA's blur; the examples whose prediction is wrong too; fewer steps further in.
    add("iba_blur", "last", bottleneck__blur_sigma=1.0)
    add("all_examples", "last", only_right=False)
    add("inner_ten_steps", bottleneck__num_steps=10)
    return config
