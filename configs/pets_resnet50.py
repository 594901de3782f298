"""Oxford-IIIT Pet, ResNet-50 from ImageNet weights: cats and dogs with masks.

    python -m train --config=configs/pets_resnet50.py --config.pretrained=resnet50.pth

Fine-tuning as in Kornblith et al., CVPR 2019 (see cub_resnet50.py), at 224 pixels. The
mask is the animal without its unsure rim.
"""

from configs import cub_resnet50


def get_config():
    config = cub_resnet50.get_config()
    config.dataset = "oxford_iiit_pet"
    config.image_size = 224
    config.plain.num_epochs = 30.0
    for phase in (config.control, config.guided):
        phase.num_epochs = 10.0
    return config
