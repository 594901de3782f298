"""Hook of mkdocs: the site's home page is the README, and RESULTS and NOTES are pages.

The pages are written for a reader of the repository; on the site everything below
``docs/`` moves up to the root, so the relative links are rewritten on the way.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Place on the site -> place in the repository, of what lies outside docs/.
ADDED = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "RESULTS.md": "RESULTS.md",
    "benchmarks/NOTES.md": "benchmarks/NOTES.md",
    "benchmarks/growth.png": "benchmarks/growth.png",
    "benchmarks/quality.png": "benchmarks/quality.png",
}
TO_SITE = {source: place for place, source in ADDED.items()}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def on_files(files, config):
    """Adds the pages and pictures from outside ``docs/``."""
    for place, source in ADDED.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points the relative links of a page to where their targets lie on the site."""
    place = page.file.src_uri
    folder = posixpath.dirname(ADDED.get(place, f"docs/{place}"))

    def rewrite(match):
        start, target, anchor, end = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        path = TO_SITE.get(path, path.removeprefix("docs/"))
        return (
            start
            + posixpath.relpath(path, posixpath.dirname(place) or ".")
            + (anchor or "")
            + end
        )

    return LINK.sub(rewrite, markdown)
