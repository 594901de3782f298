"""ImageNet, VGG-16, whose head is three dense layers.

    python -m train --config=configs/imagenet_vgg16.py --multihost

The plain phase is the recipe of Simonyan and Zisserman, "Very Deep Convolutional
Networks for Large-Scale Image Recognition", ICLR 2015: 256 images a step, momentum 0.9,
weight decay 5e-4, dropout 0.5, learning rate 0.01, 74 epochs. Where we differ: cosine
instead of three drops, a warm-up with He initialisation instead of growing the network,
random parts of the image as for ResNet-50, Nesterov's form of the momentum, no weight
decay on biases, float32 master weights with bfloat16 compute. Pretrained weights: see
imagenet_resnet50.py.
"""

from configs import imagenet_resnet50


def get_config():
    config = imagenet_resnet50.get_config()
    config.model = "vgg16"
    config.batch_size = 256
    config.label_smoothing = 0.0
    config.optimizer.weight_decay = 5e-4
    config.plain.num_epochs = 74.0
    config.plain.learning_rate = 0.01
    config.plain.warmup_epochs = 2.0
    for phase in (config.control, config.guided):
        phase.num_epochs = 5.0
        phase.learning_rate = 0.001
    return config
