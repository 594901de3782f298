"""What is measured of a split: ragged batches, and what is missing of it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from train import devices, evaluate
from train.measure import splits, statistics
from train.measure.batch import measure, measure_maps, method_maps, target_mask
from train.measure.catalogue import MEASURES

STATS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


# The same numbers from other batches and devices round differently.
CLOSE = dict(rtol=2e-4, atol=2e-5)


def without(source, *names):
    return [
        {key: value for key, value in source[i].items() if key not in names}
        for i in range(len(source))
    ]


class OneClass(nn.Module):
    """A model that knows one class only."""

    def setup(self):
        self.conv, self.dense = nn.Conv(4, (3, 3), strides=8), nn.Dense(1)

    def features(self, images, train=False):
        return nn.relu(self.conv(images))

    def head(self, features, train=False):
        return self.dense(features.mean(axis=(1, 2)))

    def __call__(self, images, train=False):
        return self.head(self.features(images, train), train)


class TestMeasureSplit:
    def test_ragged_batches_on_eight_devices_equal_single_images(self, evaluated):
        run, source, _, per_example = evaluated  # 11 images in batches of 16
        variables = run.states["guided"].variables
        single = jax.jit(
            functools.partial(
                measure,
                model=run.model,
                image_stats=STATS,
                matched_area=run.config.matched_area,
            )
        )
        for index in (0, 10):
            batch = {k: np.asarray(v)[None] for k, v in source[index].items()}
            for key, value in single(variables, batch).items():
                np.testing.assert_allclose(
                    per_example[f"guided/{key}"][index],
                    value[0],
                    err_msg=key,
                    **CLOSE,
                )

    def test_another_batch_size_gives_the_same_in_the_same_order(self, evaluated):
        run, source, _, per_example = evaluated
        config = run.config.copy_and_resolve_references()
        config.batch_size = 8  # 11 = 8 + 3
        values = splits.measure_split(
            config, run.model, run.states["plain"].variables, source
        )
        assert values["drop"].shape == (11,)
        for key, value in values.items():
            np.testing.assert_allclose(
                value, per_example[f"plain/{key}"], err_msg=key, **CLOSE
            )

    def test_random_methods_do_not_see_the_batch(self, evaluated):
        run, source, _, _ = evaluated
        config = run.config.copy_and_resolve_references()
        maps, variables = [], run.states["plain"].variables
        for config.batch_size in (8, 16):
            step = devices.compiled(
                method_maps, config, run.model, num_carried=2, method="random"
            )
            maps.append(
                splits.map_split(
                    config,
                    source,
                    lambda batch, step=step: {"maps": step(variables, None, batch)},
                )["maps"]
            )
        np.testing.assert_allclose(*maps, rtol=1e-6)
        assert not np.allclose(maps[0][0], maps[0][1])  # every image has its own

    def test_perturbation_starts_at_the_probability(self, evaluated):
        _, _, _, per_example = evaluated
        np.testing.assert_allclose(
            per_example["plain/deletion_curve"][:, 0],
            per_example["plain/probability"][:5],
            **CLOSE,
        )


class TestMissingPieces:
    def test_split_without_boxes_leaves_localisation_out(self, evaluated):
        run, source, _, per_example = evaluated
        values = splits.measure_split(
            run.config,
            run.model,
            run.states["plain"].variables,
            without(source, "bbox", "mask"),
        )
        summary = statistics.summarize(values, intervals=True)
        groups = {MEASURES[key].group for key in summary}
        assert groups == {"Prediction", "Faithfulness", "Two maps"}
        np.testing.assert_allclose(values["drop"], per_example["plain/drop"], **CLOSE)

    def test_masks_stand_in_for_boxes(self, evaluated):
        run, source, _, per_example = evaluated
        values = splits.measure_split(
            run.config,
            run.model,
            run.states["plain"].variables,
            without(source, "bbox"),
        )
        # The object is smaller than its box.
        assert (values["box_share"] <= per_example["plain/box_share"] + 1e-6).all()
        assert (values["box_share"] < per_example["plain/box_share"] - 1e-3).any()

    def test_a_mask_stands_in_where_an_image_has_no_box(self):
        mask = np.zeros((3, 8, 8), np.uint8)
        mask[:2, 2:4, 2:6] = 1
        boxes = np.array([[0, 0, 0, 0], [0, 0, 1, 0.5], [0, 0, 0, 0]], np.float32)
        target = target_mask(
            {"image": np.zeros((3, 8, 8, 3)), "bbox": boxes, "mask": mask}
        )
        np.testing.assert_array_equal(target[0], mask[0])
        assert target[1, :, :4].all() and not target[1, :, 4:].any()
        assert not target[2].any()

    def test_one_class_has_no_runner_up(self):
        model = OneClass()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
        batch = {
            "image": np.full((2, 16, 16, 3), 100, np.uint8),
            "label": np.zeros(2, np.int32),
        }
        bound = functools.partial(
            measure, model=model, image_stats=STATS, matched_area=0.2
        )
        values = jax.jit(bound)(variables, batch)
        assert "overlap" not in values and "mass_p" not in values
        np.testing.assert_array_equal(values["probability"], [1.0, 1.0])

    def test_nan_in_a_map_stays_with_its_image(self, evaluated):
        run, source, _, _ = evaluated
        batch = {
            k: np.stack([source[i][k] for i in range(3)]) for k in source[0].keys()
        }
        maps = np.random.default_rng(0).random((3, 48, 48)).astype(np.float32)
        broken = maps.copy()
        broken[1, 5, 5] = np.nan
        fn = jax.jit(
            functools.partial(
                measure_maps,
                run.states["plain"].variables,
                model=run.model,
                image_stats=STATS,
                matched_area=0.2,
            )
        )
        whole = jax.device_get(fn(batch, maps))
        values = jax.device_get(fn(batch, broken))
        for key in values:
            assert np.isnan(values[key][1]).all(), key
            np.testing.assert_array_equal(values[key][[0, 2]], whole[key][[0, 2]])
        summary = statistics.summarize(values, intervals=True)
        assert summary["drop"]["n"] == 2 and summary["drop"]["undefined"] == 1
        assert np.isfinite(summary["drop"]["mean"])

    def test_notes_name_what_is_missing(self, evaluated):
        run, _, results, _ = evaluated
        broken = json.loads(json.dumps(results))
        broken |= {"has_boxes": False, "num_images": 1, "num_classes": 1}
        broken["methods"][0]["undefined_maps"] = 2
        notes = " ".join(evaluate.notes_of(broken, [run], 1))
        for words in ("neither boxes", "one image", "one class", "2 of 5 maps of ib"):
            assert words in notes
        notes = evaluate.notes_of(results, [run], 11)
        control = "guided has no control: no plain phase with the same init, data and"
        assert any(note.startswith(control) for note in notes)
        # Untrained, and below the most frequent class.
        assert all("control" in note or "maps mean nothing" in note for note in notes)
        notes = evaluate.notes_of(results | {"split": "validation"}, [run], 20)
        assert "11 of 20 images, drawn at random" in " ".join(notes)
        assert "temperature is fitted on split validation itself" in " ".join(notes)
