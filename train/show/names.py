"""What a data set and its classes are called."""

from pathlib import Path


def class_names(data) -> tuple[str, ...]:
    """The names that the data have for their classes, else "class 0", "class 1", ..."""
    names = getattr(data, "class_names", None)
    if names:
        return tuple(map(str, names))
    return tuple(f"class {i}" for i in range(data.num_classes))


def data_name(config) -> str:
    """The data set's name, or that of the folder of pictures."""
    return config.dataset or Path(config.data).name


def short(name: str, length: int = 18) -> str:
    """A name that fits under a small picture, free of matplotlib's markup."""
    name = name if len(name) <= length else name[: length - 1] + "…"
    return name.replace("$", r"\$")
