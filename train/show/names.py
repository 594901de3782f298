"""What the classes of a data set are called."""


def class_names(data) -> tuple[str, ...]:
    """The names that the data have for their classes, else "class 0", "class 1", ..."""
    names = getattr(data, "class_names", None)
    if names:
        return tuple(map(str, names))
    return tuple(f"class {i}" for i in range(data.num_classes))


def short(name: str, length: int = 18) -> str:
    """A name that fits under a small picture, free of matplotlib's markup."""
    name = name if len(name) <= length else name[: length - 1] + "…"
    return name.replace("$", r"\$")
