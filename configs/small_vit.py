"""A small vision transformer on the embedded set, with and without guidance.

    python -m train --config=configs/small_vit.py

The digits of `quickstart.py`, patches of 6 x 6 pixels: 64 tokens and a class token.
Guided are the tokens that the last attention reads; their teacher is the bottleneck
there, whose rest of the network is one attention of the class token. Settings are the
quickstart's where they are not named; none was searched for.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model = "small_vit"
    config.model_options.patch_size = 6
    config.plain.num_epochs = 16.0
    config.plain.learning_rate = 1e-3
    config.plain.warmup_epochs = 1.0
    for phase in (config.control, config.guided):
        phase.num_epochs = 3.0
        phase.learning_rate = 5e-4
        phase.warmup_epochs = 0.2
    config.guided.update(default.BOTTLENECK)
    return config
