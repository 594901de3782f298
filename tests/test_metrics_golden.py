"""Measures of explanations against the reference arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import metrics, saliency
from tests import golden_net

MAPS = ("gcamB", "layerA", "gcamB16", "rand", "gauss", "zeros", "ones", "seg")
CONSTANT = ("zeros", "ones")


# Where the reference's order of equal values shows in the share of top pixels.
TIED = {(name, kind) for name in ("gauss", "seg") for kind in ("seg", "box")} | {
    ("gcamB", "box"),
    ("gcamB16", "box"),
}
ATOL = 3e-6  # the reference arrays' own float32 rounding
NET = golden_net.load("net1_model")
GOLDEN = golden_net.load("net1_metrics")
MASKS = {"seg": np.asarray(NET["seg_mask"]), "box": np.asarray(NET["box_mask"])}
LABELS = np.asarray(NET["labels"])


def golden_map(name):
    return np.asarray(GOLDEN[f"{name}__map32"])


@pytest.fixture(scope="module")
def whole_logits():
    return golden_net.logits(NET, np.asarray(NET["inputs"]))


@pytest.fixture(scope="module")
def explained_logits():
    """Logits on image x map, per map; the reference takes its maps unnormalised."""

    @jax.jit
    def explained(maps):
        images = metrics.explanation_map(NET["inputs"], maps, normalization="none")
        return golden_net.logits(NET, images)

    return {name: explained(golden_map(name)) for name in MAPS}


class TestGoldens:
    def test_probabilities(self, whole_logits):
        for c in range(10):
            got = metrics.probability(whole_logits, np.full(8, c))
            np.testing.assert_allclose(got, GOLDEN["softmax_p"][:, c], atol=ATOL)

    @pytest.mark.parametrize("name", MAPS)
    def test_maps_are_upsampled(self, name):
        got = saliency.upsample(np.asarray(GOLDEN[f"{name}__map"]), (32, 32))
        np.testing.assert_allclose(got, golden_map(name), atol=ATOL)

    @pytest.mark.parametrize("name", MAPS)
    def test_drop_and_increase(self, name, whole_logits, explained_logits):
        prob = metrics.probability(whole_logits, LABELS)
        explained = metrics.probability(explained_logits[name], LABELS)
        drops = metrics.drop(prob, explained)
        rises = metrics.increase(prob, explained)
        # The reference adds 1e-7 to the denominator: 4e-7 at its smallest p = .23.
        np.testing.assert_allclose(drops, GOLDEN[f"{name}__tc_drop"], atol=ATOL)
        np.testing.assert_array_equal(rises, GOLDEN[f"{name}__tc_increase"])
        for values, key in ((drops, "tc_avg_drop"), (rises, "tc_conf_increase")):
            total, count = metrics.sum_and_count(values)
            np.testing.assert_allclose(
                total / count, GOLDEN[f"{name}__{key}"], atol=ATOL
            )

    @pytest.mark.parametrize("name", MAPS)
    def test_absolute_drop(self, name, whole_logits, explained_logits):
        pairs = {
            "softmax": (
                metrics.probability(whole_logits, LABELS),
                metrics.probability(explained_logits[name], LABELS),
            ),
            "logit": (
                jnp.take_along_axis(whole_logits, LABELS[:, None], 1)[:, 0],
                jnp.take_along_axis(explained_logits[name], LABELS[:, None], 1)[:, 0],
            ),
        }
        for kind, (whole, explained) in pairs.items():
            np.testing.assert_allclose(
                metrics.absolute_drop(whole, explained),
                GOLDEN[f"{name}__pgc_drop_{kind}"],
                atol=ATOL,
                rtol=1e-6,  # logits reach 33, where one float32 step is 3.8e-6
            )
            np.testing.assert_array_equal(
                metrics.increase(whole, explained),
                GOLDEN[f"{name}__pgc_increase_{kind}"],
            )

    @pytest.mark.parametrize("kind", MASKS)
    @pytest.mark.parametrize("name", sorted(set(MAPS) - set(CONSTANT)))
    def test_localisation(self, name, kind):
        maps, mask = golden_map(name), MASKS[kind]
        prefix = f"{name}__{kind}"
        hit, count = metrics.pointing_hit(maps, mask)
        np.testing.assert_array_equal(hit, GOLDEN[f"{prefix}_pointing"])
        np.testing.assert_array_equal(count, 1)
        share, _ = metrics.box_share(maps, mask)
        np.testing.assert_allclose(share, GOLDEN[f"{prefix}_energy"], atol=ATOL)
        if (name, kind) not in TIED:
            ratio, _ = metrics.bounding_box_ratio(maps, mask, max_area=1.0)
            np.testing.assert_allclose(ratio, GOLDEN[f"{prefix}_rank"], atol=ATOL)

    @pytest.mark.parametrize("kind", MASKS)
    @pytest.mark.parametrize("name", MAPS)
    def test_pointing_with_tolerance(self, name, kind):
        for tolerance in (1, 3):
            hit, _ = metrics.pointing_hit(
                golden_map(name), MASKS[kind], tolerance=tolerance, ties="first"
            )
            wanted = GOLDEN[f"{name}__{kind}_torchray_tol{tolerance}"]  # +1 or -1
            np.testing.assert_array_equal(2 * hit - 1, wanted)

    def test_boxes(self):
        boxes = np.asarray(NET["box_yxyx"] / 32.0)
        got = metrics.boxes_to_mask(boxes, (32, 32))
        np.testing.assert_array_equal(got, NET["box_mask"])
