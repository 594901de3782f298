"""``ibsgl explain``: overlays, contact sheets, all maps, and a JSON that says it all.

Results are written as they come, in the memory of a chunk of photos; what one photo,
a full disk, Ctrl-C or SIGTERM costs is that photo, or the photos after it.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import attribution, metrics
from ibsgl_jax.app import box_entries, drawing, outputs, photos, stats_cache, terminal
from ibsgl_jax.app import classifier as classifiers
from ibsgl_jax.app.classifier import Classifier
from ibsgl_jax.app.terminal import shown
from ibsgl_jax.app.titles import METHOD_TITLES
from ibsgl_jax.errors import UserError

SHEET_ROWS = 10
_NAMED = 5


def explain(
    arguments: Sequence[str],
    *,
    methods: Sequence[str],
    out: str | Path,
    model: str,
    weights: str | None = None,
    checkpoint: str | None = None,
    layer: str | None = None,
    stats: str | None = None,
    seed: int = 0,
    chunk_size: int = 8,
    target: str | None = None,
    fit: str | None = None,
    boxes: float | None = None,
) -> int:
    """Explains the photos that the arguments name; the flags are those of ``cli``.

    Returns:
      The exit status: 2 if some photo could not be explained.

    Raises:
      UserError: nothing can be explained; nothing was written.
      KeyboardInterrupt (SIGTERM: ``terminal.Terminated``): with what was done, whole.
    """
    out = Path(out)
    found = photos.find(arguments)
    _tell_left_out(found)
    if not found.sources:
        terminal.say_list("no photo to explain", found.failures or ["all left out"])
        return terminal.MISTAKE
    paths = [source.path for source in found.sources]
    plan = outputs.plan(out, paths, methods, SHEET_ROWS)
    inputs = [*paths, *(Path(file) for file in (weights, checkpoint) if file)]
    outputs.check(out, plan.names, inputs)
    classifier = classifiers.load(model, weights=weights, checkpoint=checkpoint)
    fit = fit or classifier.preprocessing.fit
    one_class = classifiers.parse_class(target, classifier.class_names)
    features_fn, head_fn = classifiers.split(classifier, layer)
    moments, stats_source = None, None
    if "ib" in methods:
        moments, stats_source = stats_cache.feature_moments(
            classifier,
            features_fn,
            layer=layer,
            stats=stats,
            fit=fit,
            chunk_size=chunk_size,
            sources=found.sources,
        )
    explain_fn = make_explain_fn(
        methods, classifier, features_fn, head_fn, moments, seed, one_class
    )
    blocks = photos.read_blocks(
        found.sources,
        classifier.preprocessing,
        fit=fit,
        block_size=chunk_size,
        warn_fn=terminal.warn,
    )
    about = {
        "model": classifier.name,
        "weights": str(checkpoint or classifier.weights_path or "packaged"),
        "layer": layer or "last convolutional features",
        "methods": list(methods),
        "fit": fit,
        "seed": seed,
        "feature_statistics": stats_source,
        "box_threshold": boxes,
    }
    with outputs.claim(out, plan.names, inputs) as folder:
        results = Results(folder, plan, found, classifier, about, boxes)
        results.fill(blocks, explain_fn)
    terminal.end_progress()
    print(f"{len(results.entries)} photos explained in {shown(out)}")
    if results.failures:
        heading = f"{len(results.failures)} not explained"
        terminal.say_list(heading, results.failures)
    return terminal.MISTAKE if results.failures else 0


def _tell_left_out(found: photos.Found) -> None:
    for kind, paths in (
        ("left out, results of earlier runs", found.results),
        ("skipped, no images that Pillow opens", found.skipped),
    ):
        if paths:
            names = ", ".join(map(str, paths[:_NAMED]))
            more = f" and {len(paths) - _NAMED} more" if paths[_NAMED:] else ""
            terminal.say(f"{kind} ({len(paths)}): {names}{more}")


class Results:
    """What has been explained so far, and is in the folder.

    Attributes:
      entries: of the JSON, one for each photo explained.
      failures: a line for each of the others.
    """

    def __init__(
        self,
        folder: outputs.OutputFolder,
        plan: outputs.Plan,
        found: photos.Found,
        classifier: Classifier,
        about: dict,
        boxes: float | None = None,
    ):
        self.entries: list[dict] = []
        self.failures = list(found.failures)
        self._folder, self._classifier, self._about = folder, classifier, about
        self._boxes = boxes
        self._found, self._plan, self._num_sheets = found, plan, 0
        self._rows: list[tuple] = []
        sources = map(id, found.sources)
        self._places = dict(zip(sources, range(len(found.sources)), strict=True))

    def fill(self, blocks, explain_fn: Callable) -> None:
        """Explain and write block by block; leave a whole folder however it ends."""
        size = self._classifier.preprocessing.size
        num_photos, num_done = len(self._found.sources), 0
        try:
            self._folder.open(self._about["methods"], num_photos, (size, size))
        except OSError as error:
            raise UserError(
                f"--out {self._folder.path}: no room for the maps of {num_photos} "
                f"photos ({error.strerror})"
            ) from None
        stopped, complete = None, False
        try:
            for block in blocks:
                self.failures += block.failures
                if block.photos:
                    self._add_block(block, *explain_fn(block.pixels))
                num_done += len(block.photos) + len(block.failures)
                terminal.show_progress(f"photo {num_done} of {num_photos}")
            complete = True
        except (KeyboardInterrupt, OSError) as error:
            stopped = error
        finally:
            with _uninterrupted():
                self._finish(complete, is_full=isinstance(stopped, OSError))
        done = f"{len(self.entries)} of {num_photos} photos are explained"
        if isinstance(stopped, KeyboardInterrupt):
            stopped.args = (f"{done} in {self._folder.path}",)
            raise stopped
        if stopped is not None:
            raise UserError(f"{_cannot_write(stopped)}; {done}") from None

    def _add_block(self, block: photos.Block, logits, classes, maps: dict) -> None:
        for i, (source, photo) in enumerate(block.photos):
            own = {method: values[i] for method, values in maps.items()}
            if not np.all(np.isfinite(logits[i])):
                self._fail(source, _not_finite(self._classifier, "logits"))
            elif not all(np.all(np.isfinite(values)) for values in own.values()):
                self._fail(source, _not_finite(self._classifier, "maps"))
            else:
                self._add_photo(source, photo, logits[i], classes[i], own)

    def _fail(self, source: photos.Source, why: str) -> None:
        self.failures.append(f"{source.path}: {why}")

    def _add_photo(self, source, photo, logits, target, maps: dict) -> None:
        place = self._places[id(source)]
        files = self._plan.photos[place]
        entry = _describe(source, photo, logits, target, self._classifier)
        entry["files"] = files
        if self._boxes is not None:
            entry["boxes"] = box_entries.describe(maps, photo.box, self._boxes)
        if self._plan.shortened[place]:
            entry["note"] = "its name is too long: the files' names are shortened"
        share = 100 * entry["class"]["probability"]
        title = f"{entry['class']['name']}, {share:.0f} %"
        panels = [
            drawing.Panel(
                view=photo.view,
                heat=maps[method],
                method=METHOD_TITLES[method],
                unit="bits per pixel" if method == "ib" else None,
            )
            for method in files
        ]
        try:
            for name, panel in zip(files.values(), panels, strict=True):
                self._folder.write(name, drawing.overlay(panel, title=title))
            self._folder.write_maps(len(self.entries), maps)
        except OSError as error:
            self._folder.remove(files.values())
            if error.errno in outputs.FULL:
                raise
            self._fail(source, _cannot_write(error))
            return
        except KeyboardInterrupt:
            self._folder.remove(files.values())
            raise
        self.entries.append(entry)
        self._rows.append((source.path.name, title, panels))
        if len(self._rows) == SHEET_ROWS:
            self._write_sheet()

    def _write_sheet(self) -> None:
        """Writes the rows gathered, and empties the list."""
        rows = self._rows[:]
        self._rows.clear()
        name = self._plan.sheets[self._num_sheets]
        self._num_sheets += 1
        self._folder.write(name, drawing.contact_sheet(rows))

    def _finish(self, complete: bool, *, is_full: bool) -> None:
        if self._rows and not is_full:
            try:
                self._write_sheet()
            except OSError as error:
                self.failures.append(f"the contact sheet: {_cannot_write(error)}")
        explanation = self._about | {
            "link": self._classifier.link,
            "complete": complete,
            "photos": self.entries,
            "failed": [shown(failure) for failure in self.failures],
            "skipped": [shown(path) for path in self._found.skipped],
            "results_left_out": len(self._found.results),
        }
        explanation["weights"] = shown(explanation["weights"])
        if explanation["feature_statistics"]:
            explanation["feature_statistics"] = shown(explanation["feature_statistics"])
        self._folder.finish(explanation, len(self.entries))


def _cannot_write(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    room = "; make room and repeat the command" if error.errno in outputs.FULL else ""
    return f"{place}cannot be written ({error.strerror}{room})"


def _not_finite(classifier: Classifier, what: str) -> str:
    return (
        f"{classifier.name} answers with NaN or infinite {what}: damaged weights, or "
        "those of another model?"
    )


@contextlib.contextmanager
def _uninterrupted():
    """A second signal does not cut short what saves the results."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = signal.SIGINT, signal.SIGTERM
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_explain_fn(
    methods: Sequence[str],
    classifier: Classifier,
    features_fn: Callable,
    head_fn: Callable,
    moments,
    seed: int,
    target: int | None,
) -> Callable:
    """A function: pixels [N, ...] -> (logits [N, C], classes [N], {method: maps}).

    One compiled function for all methods, so that they share the pass through the
    network.
    """
    tapped_fn = None
    if "full_grad" in methods:
        tapped_fn = classifiers.make_tapped_fn(classifier)

    @jax.jit
    def explain(features_fn, head_fn, tapped_fn, moments, key, pixels):
        logits = head_fn(features_fn(pixels))
        if target is None:
            classes = jnp.argmax(logits, axis=-1)
        else:
            classes = jnp.full(len(pixels), target)
        maps = {}
        for method in methods:
            attribution_fn = attribution.make_attribution_fn(
                method,
                features_fn,
                head_fn,
                key=key,
                moments=moments,
                tapped_fn=tapped_fn,
                **classifiers.method_options(method, head_fn, classifier.link),
            )
            maps[method] = attribution_fn(pixels, classes)
        return logits, classes, maps

    def explain_fn(pixels):
        key = jax.random.key(seed)
        results = explain(features_fn, head_fn, tapped_fn, moments, key, pixels)
        return jax.tree.map(np.asarray, results)

    return explain_fn


def _describe(source, photo, logits, target, classifier: Classifier) -> dict:
    probabilities = np.asarray(metrics.probabilities(logits, link=classifier.link))

    def one_class(index):
        return {
            "index": int(index),
            "name": shown(classifier.class_names[index]),
            "probability": float(probabilities[index]),
            "logit": float(logits[index]),
        }

    best = np.argsort(-logits, kind="stable")[:5]
    return {
        "path": shown(source.path),
        "size": list(photo.size),
        "box": [round(edge, 2) for edge in photo.box],
        "class": one_class(target),
        "predicted": [one_class(index) for index in best],
    }
