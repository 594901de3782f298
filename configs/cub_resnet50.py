"""CUB-200-2011, ResNet-50 from ImageNet weights: birds with boxes and masks.

    python -m train --config=configs/cub_resnet50.py --config.pretrained=resnet50.pth

Fine-tuning as in Kornblith et al., "Do Better ImageNet Models Transfer Better?", CVPR
2019: all layers, SGD with Nesterov momentum 0.9, cosine, random parts of the image and
mirror, the learning rate and weight decay from the middle of their grid. Where we
differ: 64 images a step and 60 epochs where they took 256 and 20,000 steps, 448
pixels, as is usual for birds, no weight decay on norms and biases, and label
smoothing. `guided.teacher = "mask"` is the oracle.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset = "caltech_birds2011"
    config.train_split = "train[:90%]"
    config.validation_split = "train[90%:]"
    config.test_split = "test"
    config.image_size = 448
    config.image_mean = (0.485, 0.456, 0.406)
    config.image_std = (0.229, 0.224, 0.225)
    config.augment = "imagenet"
    config.eval_transform = "resize_center"
    config.num_threads = 0
    config.num_workers = 8

    config.model = "resnet50"
    config.dtype = "bfloat16"

    config.batch_size = 64
    config.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.weight_decay = 1e-4
    config.optimizer.momentum = 0.9

    config.plain.init = "pretrained"
    config.plain.num_epochs = 60.0
    config.plain.learning_rate = 0.01
    config.plain.warmup_epochs = 2.0
    for phase in (config.control, config.guided):
        phase.num_epochs = 10.0
        phase.learning_rate = 0.002
    return config
