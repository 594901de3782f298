"""The one writer of tables in Markdown; imports nothing."""


def markdown(header, rows) -> str:
    """A table of texts: the header's cells and, per row, as many."""
    lines = [header, ["---"] * len(header), *rows]
    texts = ["| " + " | ".join(map(_cell, cells)) + " |" for cells in lines]
    texts[1] = texts[1].replace(" ", "")
    return "\n".join(texts)


def _cell(text):
    """A name may hold what would end its cell."""
    return " ".join(text.split("\n")).replace("|", "\\|")
