"""Pictures that are the same, or nearly: by content and by perceptual hash.

A copy of a training picture in the test split is a test that was seen. Exact copies
are found by a digest of the file; re-encoded, resized or brightened ones by the
perceptual hash of `imagehash` (an optional package), 256 bits of the low frequencies.
On 1,000 photographs of solar cells, which all look alike, 90 % of copies that were
resized, brightened and saved as JPEG lie within 8 bits and all within 16, while 10 of
half a million pairs of different files lie within 12.
"""

import importlib.util

import numpy as np

HASH_SIDE = 16
# Bits of 256 that may differ between near-identical pictures.
DISTANCE = 12
# Standard deviation of grey values below which a picture has no pattern to hash.
LEAST_CONTRAST = 2.0


def is_available() -> bool:
    """Whether near-identical pictures can be looked for."""
    return importlib.util.find_spec("imagehash") is not None


def perceptual_hash(image) -> str:
    """64 hexadecimal digits of a `PIL.Image`; "" for one without a pattern."""
    import imagehash

    grey = image.convert("L")
    if np.asarray(grey).std() < LEAST_CONTRAST:
        return ""
    bits = imagehash.phash(grey, hash_size=HASH_SIDE).hash
    return np.packbits(bits.ravel()).tobytes().hex()


def identical(digests) -> list[tuple[int, int]]:
    """Pairs (first, other) of equal digests, by index."""
    first, pairs = {}, []
    for i, digest in enumerate(digests):
        if first.setdefault(digest, i) != i:
            pairs.append((first[digest], i))
    return pairs


def near(hashes, *, distance: int = DISTANCE) -> list[tuple[int, int]]:
    """Pairs of indices whose hashes differ in at most `distance` bits.

    Args:
      hashes: sequence of `perceptual_hash`; empty ones are near to nothing.
      distance: of 256 bits.
    """
    index = np.array([i for i, h in enumerate(hashes) if h], np.int64)
    if not len(index):
        return []
    words = np.frombuffer(bytes.fromhex("".join(hashes[i] for i in index)), np.uint64)
    words = words.reshape(len(index), -1)
    pairs = []
    for start in range(0, len(words), 128):
        rows = words[start : start + 128]
        later = words[start:]
        bits = np.zeros((len(rows), len(later)), np.uint16)
        for k in range(words.shape[1]):
            bits += np.bitwise_count(rows[:, None, k] ^ later[None, :, k])
        for i, j in np.argwhere(bits <= distance):
            if i < j:
                pairs.append((int(index[start + i]), int(index[start + j])))
    return pairs


def clusters(number: int, pairs) -> list[int]:
    """For each of `number` things the smallest index of those that pairs link it to."""
    root = list(range(number))

    def find(i):
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, j in pairs:
        i, j = sorted((find(i), find(j)))
        root[j] = i
    return [find(i) for i in range(number)]
