"""Boxes of maps: components against scipy's, boxes and accuracies by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from ibsgl_jax import metrics
from ibsgl_jax.app import box_entries
from tests.quick_explain import (
    explanation,
    quick,  # noqa: F401
    save_photo,
)


def scipys(mask):
    labels, number = ndimage.label(mask, structure=np.ones((3, 3)))
    if number == 0:
        return np.zeros_like(mask)
    return labels == 1 + np.argmax(ndimage.sum(mask, labels, range(1, number + 1)))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_largest_component_is_scipys(share):
    mask = np.random.default_rng(0).random((6, 19, 23)) < share
    found = jax.jit(metrics.largest_component)(mask)
    for one, given in zip(found, mask, strict=True):
        np.testing.assert_array_equal(one, scipys(given))


def test_a_spiral_is_one_part():
    mask = np.zeros((1, 9, 9), bool)
    mask[0, [0, 8], :], mask[0, :, 8] = True, True
    mask[0, 2:, 0], mask[0, 2, :7], mask[0, 2:7, 6], mask[0, 6, 2:7] = (True,) * 4
    np.testing.assert_array_equal(metrics.largest_component(mask), mask)


def test_of_two_alike_the_first():
    mask = np.zeros((1, 4, 5), bool)
    mask[0, 3, 0], mask[0, 0, 4] = True, True
    (found,) = metrics.largest_component(mask)
    assert found[0, 4] and found.sum() == 1


class TestBoxes:
    def maps(self):
        maps = np.zeros((3, 8, 10), np.float32)
        maps[0, 2:4, 3:9] = 1.0  # rows 2 and 3, columns 3 to 8
        maps[0, 7, 0] = 2.0  # the peak, a part of one pixel
        maps[1] = -1.0
        maps[2, 0, 0] = 0.4
        return jnp.asarray(maps)

    def test_by_hand(self):
        found, count = metrics.boxes(self.maps(), threshold=0.4)
        np.testing.assert_allclose(
            found, [[2 / 8, 0.3, 4 / 8, 0.9], [0] * 4, [0, 0, 1 / 8, 0.1]]
        )
        np.testing.assert_array_equal(count, [1, 0, 1])
        # Above half of the maximum only the peak is left.
        found, _ = metrics.boxes(self.maps(), threshold=0.5)
        np.testing.assert_allclose(found[0], [7 / 8, 0, 1, 0.1])

    def test_a_box_is_that_of_its_own_mask(self):
        bbox = jnp.array([[0.25, 0.3, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0]])
        found, _ = metrics.mask_boxes(metrics.boxes_to_mask(bbox, (8, 10)))
        np.testing.assert_allclose(found, bbox, atol=1e-6)

    def test_iou(self):
        one = jnp.array([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.1, 0.1], [0, 0, 0, 0.0]])
        two = jnp.array([[0.0, 0.25, 0.5, 0.75], [0.5, 0.5, 1.0, 1.0], [0, 0, 0, 0.0]])
        np.testing.assert_allclose(metrics.box_iou(one, two), [1 / 3, 0, 0], rtol=1e-6)

    def test_corloc_and_its_curve(self):
        bbox = jnp.array([[0.25, 0.3, 0.5, 0.8], [0, 0, 1, 1], [0.5, 0.5, 0.5, 0.9]])
        # IoU 5 / 6 of the first; no part in the second; no true box in the third.
        score, count = metrics.corloc(self.maps(), bbox, threshold=0.4)
        np.testing.assert_array_equal(score, [1, 0, 0])
        np.testing.assert_array_equal(count, [1, 1, 0])
        score, _ = metrics.corloc(self.maps(), bbox, threshold=0.4, least=0.84)
        assert score[0] == 0
        curve, count = metrics.box_accuracy_curve(self.maps(), bbox, num_thresholds=10)
        np.testing.assert_array_equal(curve[0], [1] * 5 + [0] * 5)
        assert float((curve.sum(0) / count.sum()).max()) == 0.5

    def test_a_map_that_is_not_finite(self):
        maps = self.maps().at[0, 0, 0].set(jnp.nan)
        bbox = jnp.tile(jnp.array([[0.0, 0.0, 1.0, 1.0]]), (3, 1))
        score, count = metrics.corloc(maps, bbox)
        np.testing.assert_array_equal(count, [0, 1, 1])
        assert bool(jnp.isfinite(score).all())

    def test_threshold(self):
        with pytest.raises(ValueError, match="threshold 1 selects nothing"):
            metrics.boxes(self.maps(), threshold=1)


class TestInTheJson:
    def test_run_lengths_are_cocos(self):
        mask = np.array([[0, 1, 1], [1, 1, 0]], bool)
        # Column by column: 0 1 | 1 1 | 1 0.
        assert box_entries.run_lengths(mask) == [1, 4, 1]
        assert box_entries.run_lengths(~mask) == [0, 1, 4, 1]
        assert box_entries.run_lengths(np.zeros((2, 2), bool)) == [4]

    def test_boxes_in_the_photos_pixels(self):
        one = np.zeros((8, 10), np.float32)
        one[2:4, 3:9], one[7, 0] = 1.0, 0.9
        found = box_entries.describe(
            {"ib": one, "grad_cam": 0 * one}, (10.0, 0.0, 110.0, 40.0), 0.5
        )
        assert found["grad_cam"] is None
        assert found["ib"]["box"] == [40.0, 10.0, 100.0, 20.0]
        counts = found["ib"]["mask"]["counts"]
        assert sum(counts) == 80 and sum(counts[1::2]) == 12

    def test_the_command_writes_them(self, quick, tmp_path):  # noqa: F811
        photo = save_photo(tmp_path / "a.png")
        status, _, _ = quick(photo, "--out", tmp_path / "maps", "--boxes", "0.4")
        told = explanation(tmp_path / "maps")
        assert status == 0 and told["box_threshold"] == 0.4
        # The whole of what the model saw: the photo is of one colour.
        assert told["photos"][0]["boxes"]["grad_cam"]["box"] == told["photos"][0]["box"]
        status, _, _ = quick(photo, "--out", tmp_path / "others")
        assert "boxes" not in explanation(tmp_path / "others")["photos"][0]

    @pytest.mark.parametrize("share", ["1", "-1", "nan", "x"])
    def test_what_is_no_share(self, share, quick, tmp_path):  # noqa: F811
        status, _, told = quick(tmp_path, f"--boxes={share}")
        assert status == 2 and "is no share from 0 to below 1" in told
