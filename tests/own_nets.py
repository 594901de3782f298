"""Models as a user would write them, good and bad ones, for the tests of them."""

SOURCE = '''
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


class Net(nn.Module):
    """Two convolutions and a mean; no dtype, no axis_name, no pooled_linear."""

    num_classes: int
    width: int = 8

    def setup(self):
        self.first = nn.Conv(self.width, (3, 3), strides=2)
        self.norm = nn.BatchNorm()
        self.second = nn.Conv(self.width, (3, 3))
        self.last = nn.Dense(self.num_classes)

    def features(self, images, train=False):
        x = self.norm(self.first(images), use_running_average=not train)
        return nn.relu(self.second(nn.relu(x)))

    def head(self, features, train=False):
        return self.last(jnp.mean(features, axis=(1, 2)))

    def __call__(self, images, train=False):
        return self.head(self.features(images, train), train)


class Flat(Net):
    def features(self, images, train=False):
        return jnp.mean(super().features(images, train), axis=(1, 2))

    def head(self, features, train=False):
        return self.last(features)


class Seven(Net):
    def setup(self):
        super().setup()
        self.seven = nn.Dense(7)

    def head(self, features, train=False):
        return self.seven(jnp.mean(features, axis=(1, 2)))


class Broken(Net):
    def features(self, images, train=False):
        return super().features(images[..., :1] @ jnp.ones((2, 3)), train)


class Headless(nn.Module):
    num_classes: int

    def features(self, images, train=False):
        return images


class Trainless(Net):
    def features(self, images):
        return images


class Nameless(nn.Module):
    def features(self, images, train=False):
        return images

    def head(self, features, train=False):
        return features


class Act(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(x)


class Compact(nn.Module):
    """As Net, but without its methods; and with a name of its own for train."""

    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, images, training=False):
        x = nn.Conv(self.width, (3, 3), strides=2, name="first")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not training, name="norm")(x))
        x = Act(name="act")(nn.Conv(self.width, (3, 3), name="second")(x))
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, name="last")(x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(4, (3, 3), name="second")(x))


class Hidden(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(4, (3, 3), strides=2, name="first")(images)
        x = nn.remat(Inner)(name="block")(x)
        return nn.Dense(self.num_classes, name="last")(jnp.mean(x, axis=(1, 2)))


class OfNNX(nnx.Module):
    def __init__(self, num_classes, width=8, *, rngs):
        self.blocks = nnx.List(
            [
                nnx.Conv(3, width, (3, 3), strides=2, rngs=rngs),
                nnx.Conv(width, width, (3, 3), rngs=rngs),
            ]
        )
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(width, num_classes, rngs=rngs)

    def features(self, images):
        return nnx.relu(self.blocks[1](nnx.relu(self.norm(self.blocks[0](images)))))

    def head(self, features):
        return self.last(self.dropout(jnp.mean(features, axis=(1, 2))))

    def __call__(self, images):
        return self.head(self.features(images))


class WithState(OfNNX):
    def __init__(self, num_classes, *, rngs):
        super().__init__(num_classes, rngs=rngs)
        self.seen = nnx.Variable(jnp.zeros(()))


class Rngless(nnx.Module):
    def __init__(self, num_classes):
        pass


def function(num_classes):
    raise AssertionError("called")
'''
