"""What stands under pictures and in the report's head, whatever people call things."""

import warnings

import pytest
from ml_collections import ConfigDict

from train.show import figures, names


@pytest.mark.parametrize(
    "dataset, data, told",
    [
        ("photo_digits", "", "photo_digits"),
        ("", "/home/me/solar cells", "solar cells"),
        ("", "(given from Python)", "(given from Python)"),
    ],
)
def test_data_have_a_name(dataset, data, told):
    assert names.data_name(ConfigDict({"dataset": dataset, "data": data})) == told


def test_a_sign_that_the_font_lacks_is_no_warning(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.text(0.5, 0.5, names.short("fine ✅ 💥"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures.save(figure, tmp_path / "a.png").exists()
