"""Photos of every kind in, pictures out."""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from ibsgl_jax import images
from train.data import decoded


class Preprocessing(NamedTuple):
    size: int = 32
    resize: int = 40
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.25, 0.25, 0.25)


def gradient_image(width=60, height=40):
    """Red grows to the right, green downwards."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, axis=0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, axis=1)
    return np.stack([x, y, np.full_like(x, 90)], axis=-1).round().astype(np.uint8)


def make_png(width, height, rows, *, bits, colours):
    """A PNG of raw rows, each with its filter's byte before it."""

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    data = zlib.compress(rows, 1)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    )


def black_png(side):
    """A whole, valid PNG of side x side pixels of one bit, small however large."""
    rows = bytes((1 + -(-side // 8)) * side)
    return make_png(side, side, rows, bits=1, colours=0)


def deep_png(width, height, rows):
    """A PNG of 16 bits for each of three colours, which Pillow does not write."""
    return make_png(width, height, rows, bits=16, colours=2)


def jpeg_bytes(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=95)
    return file.getvalue()


class TestRead:
    def read(self, folder, image, name, **options):
        path = folder / name
        image.save(path, **options)
        read = images.read(path)
        assert read.mode == "RGB"
        return np.asarray(read).astype(int)

    def test_plain(self, tmp_path):
        pixels = gradient_image()
        read = self.read(tmp_path, Image.fromarray(pixels), "a.png")
        np.testing.assert_array_equal(read, pixels)

    def test_grey(self, tmp_path):
        grey = gradient_image()[..., 0]
        read = self.read(tmp_path, Image.fromarray(grey), "a.png")
        np.testing.assert_array_equal(read, grey[..., None].repeat(3, axis=-1))

    def test_one_bit(self, tmp_path):
        read = self.read(tmp_path, Image.new("1", (4, 4), 1), "a.png")
        assert np.all(read == 255)

    @pytest.mark.parametrize("mode, name", [("RGBA", "a.png"), ("LA", "a.png")])
    def test_transparency_lies_on_white(self, tmp_path, mode, name):
        image = Image.fromarray(gradient_image()).convert(mode)
        alpha = np.zeros((40, 60), np.uint8)
        alpha[:, 30:] = 255
        image.putalpha(Image.fromarray(alpha))
        read = self.read(tmp_path, image, name)
        assert np.all(read[:, :30] == 255)
        opaque = np.asarray(image.convert("RGB"))[:, 30:]
        np.testing.assert_array_equal(read[:, 30:], opaque)

    def test_palette_with_transparency(self, tmp_path):
        image = Image.new("P", (4, 4), 1)
        image.putpalette([0, 0, 0, 200, 10, 10])
        image.putpixel((0, 0), 0)
        read = self.read(tmp_path, image, "a.gif", transparency=0)
        assert read[0, 0].tolist() == [255, 255, 255]
        assert read[2, 2].tolist() == [200, 10, 10]

    def test_sixteen_bit(self, tmp_path):
        values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
        expected = np.arange(256).reshape(16, 16)
        for name in ("a.png", "a.tif"):
            read = self.read(tmp_path, Image.fromarray(values), name)
            np.testing.assert_array_equal(read[..., 0], expected)

    def test_float(self, tmp_path):
        values = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
        read = self.read(tmp_path, Image.fromarray(values), "a.tif")
        assert read[0, :, 0].tolist() == [0, 128, 255, 0]

    @pytest.mark.parametrize(
        "values, line",
        [
            ([[0.0, 255.0]], "floating-point values from 0 to 255; 0 to 1 can be read"),
            ([[-0.5, 0.5]], "from -0.5 to 0.5"),
            ([[0.0, np.inf]], "from 0 to inf"),
            ([[np.nan, np.nan]], "every pixel is NaN"),
        ],
    )
    def test_float_out_of_range_is_one_line(self, tmp_path, values, line):
        Image.fromarray(np.array(values, np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(images.ImageError, match=line) as raised:
            images.read(tmp_path / "a.tif")
        assert "\n" not in str(raised.value)

    def told(self, path):
        """The picture, and the lines that ``read`` warns with."""
        lines = []
        return np.asarray(images.read(path, warn_fn=lines.append)), lines

    def test_nan_is_told(self, tmp_path):
        values = np.array([[0.0, 1.0, np.nan]], np.float32)
        Image.fromarray(values).save(tmp_path / "a.tif")
        assert "1 pixels are NaN" in self.told(tmp_path / "a.tif")[1][0]

    @pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2"])
    @pytest.mark.parametrize("bits, is_told", [(10, 1), (12, 1), (14, 1), (16, 0)])
    def test_fewer_bits_in_sixteen_are_told(self, tmp_path, name, bits, is_told):
        values = np.linspace(0, 2**bits - 1, 1600).astype(np.uint16).reshape(40, 40)
        Image.fromarray(values).save(tmp_path / name)
        read, lines = self.told(tmp_path / name)
        assert len(lines) == is_told
        if is_told:
            assert f"its largest value is {2**bits - 1:,} of 65,535" in lines[0]
        assert abs(int(read.max()) - round((2**bits - 1) / 257)) <= 1

    def test_sixteen_bits_of_colour(self, tmp_path):
        for bits in (12, 16):
            values = np.linspace(0, 2**bits - 1, 300).astype(">u2").reshape(10, 10, 3)
            rows = b"".join(b"\0" + row.tobytes() for row in values)
            (tmp_path / "a.png").write_bytes(deep_png(10, 10, rows))
            read, lines = self.told(tmp_path / "a.png")
            assert read.max() == (2**bits - 1) // 256
            assert [("at most 4,095" in line) for line in lines] == [True] * (bits < 16)

    @pytest.mark.parametrize("dtype", [np.int32, np.int16, np.uint16, ">u2"])
    def test_whole_numbers_of_other_kinds(self, tmp_path, dtype):
        values = np.array([[0, 257 * 100], [257, 32_767]], dtype)
        path = tmp_path / "a.tif"
        if dtype == ">u2":
            Image.frombytes("I;16B", (2, 2), values.tobytes()).save(path)
        elif dtype == np.int16:
            Image.fromarray(values.astype(np.int32)).save(path)
        else:
            Image.fromarray(values).save(path)
        read, lines = self.told(path)
        assert read[..., 0].tolist() == [[0, 100], [1, 127]] and not lines

    @pytest.mark.parametrize("value", [-1, 65_536, 2**31 - 1])
    def test_whole_numbers_out_of_range_are_one_line(self, tmp_path, value):
        Image.fromarray(np.array([[0, value]], np.int32)).save(tmp_path / "a.tif")
        with pytest.raises(images.ImageError, match="0 to 65,535 can be read"):
            images.read(tmp_path / "a.tif")

    def test_from_memory(self, tmp_path):
        data = jpeg_bytes(gradient_image())
        assert images.read("a pipe", data=data).size == (60, 40)
        for bad, line in ((b"", "empty"), (b"text", "not an image")):
            with pytest.raises(images.ImageError, match=f"a pipe: .*{line}"):
                images.read("a pipe", data=bad)

    def test_a_damaged_exif_block_is_told(self, tmp_path, monkeypatch):
        from PIL import ImageOps

        def fail(image):
            raise SyntaxError("not a TIFF file")

        monkeypatch.setattr(ImageOps, "exif_transpose", fail)
        Image.fromarray(gradient_image()).save(tmp_path / "a.png")
        read, lines = self.told(tmp_path / "a.png")
        np.testing.assert_array_equal(read, gradient_image())
        assert "EXIF" in lines[0]

    def test_a_pipe_without_a_writer_does_not_hang(self, tmp_path):
        import os

        os.mkfifo(tmp_path / "a.png")
        with pytest.raises(images.ImageError, match="no regular file"):
            images.read(tmp_path / "a.png")

    @pytest.mark.parametrize("side", [2**16, 2**31 - 1])
    @pytest.mark.parametrize("kind", ["png", "ppm", "bmp"])
    def test_an_absurd_declared_size_is_one_line(self, tmp_path, side, kind):
        content = {
            "png": black_png(40).replace(
                struct.pack(">II", 40, 40), struct.pack(">II", side, side)
            ),
            "ppm": b"P6 %d %d 255\n" % (side, side) + bytes(99),
            "bmp": b"BM"
            + struct.pack("<IHHI", 99, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0),
        }[kind]
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(images.ImageError) as raised:
            images.read(tmp_path / "a")
        assert "\n" not in str(raised.value)

    def test_cmyk(self, tmp_path):
        image = Image.fromarray(gradient_image()).convert("CMYK")
        read = self.read(tmp_path, image, "a.jpg", quality=95)
        # JPEG's loss, and CMYK without black.
        assert np.mean(np.abs(read - gradient_image())) < 4

    @pytest.mark.parametrize("name", ["a.png", "a.tif"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_rotation(self, tmp_path, orientation, name):
        upright = Image.fromarray(gradient_image())
        # How a camera held so would have stored it: the inverse of what 1..8 mean.
        stored = {
            2: [Image.Transpose.FLIP_LEFT_RIGHT],
            3: [Image.Transpose.ROTATE_180],
            4: [Image.Transpose.FLIP_TOP_BOTTOM],
            5: [Image.Transpose.TRANSPOSE],
            6: [Image.Transpose.ROTATE_90],
            7: [Image.Transpose.TRANSVERSE],
            8: [Image.Transpose.ROTATE_270],
        }
        image = upright
        for operation in stored.get(orientation, []):
            image = image.transpose(operation)
        exif = Image.Exif()
        exif[0x0112] = orientation
        read = self.read(tmp_path, image, name, exif=exif)
        np.testing.assert_array_equal(read, gradient_image())
        assert decoded.upright_size(tmp_path / name) == upright.size
        grey = image.convert("L")
        grey.save(tmp_path / name, exif=exif)  # uncompressed in a TIFF, so mapped
        wanted = np.asarray(upright.convert("L"))
        found = np.asarray(images.read(tmp_path / name))[..., 0]
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(decoded.read_mask(tmp_path / name), wanted > 0)

    def test_first_frame_of_an_animation(self, tmp_path):
        frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
        options = dict(save_all=True, append_images=frames[1:])
        read = self.read(tmp_path, frames[0], "a.gif", **options)
        assert read[0, 0].tolist() == [255, 0, 0]

    @pytest.mark.parametrize(
        "name, content, line",
        [
            ("empty.jpg", b"", "empty"),
            ("text.jpg", b"dear diary, this is no image", "not an image"),
            ("cut.jpg", jpeg_bytes(gradient_image(600, 400))[:2000], "truncated"),
            ("cut.png", black_png(40)[:44], "damaged"),
            ("large.png", black_png(11_000), "11000 x 11000 pixels; at most 100"),
            ("bomb.png", black_png(20_000), "too many pixels; at most 100 million"),
        ],
        ids=["empty", "text", "cut JPEG", "cut PNG", "large", "bomb"],
    )
    def test_bad_files(self, tmp_path, name, content, line):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(images.ImageError, match=line) as raised:
            images.read(tmp_path / name)
        assert name in str(raised.value) and "\n" not in str(raised.value)

    def test_missing_file_and_folder(self, tmp_path):
        with pytest.raises(images.ImageError, match="no such file"):
            images.read(tmp_path / "nothing.jpg")
        with pytest.raises(images.ImageError, match="is a folder"):
            images.read(tmp_path)


class TestPrepare:
    def test_equals_resize_then_crop(self):
        image = Image.fromarray(gradient_image(90, 60))
        photo = images.prepare(image, Preprocessing())
        resized = image.resize((60, 40), Image.Resampling.BICUBIC)
        cut = np.asarray(resized.crop((14, 4, 46, 36)), np.float32)
        # One rounding to 8 bits apart; in units of 1 / (255 * 0.25).
        np.testing.assert_allclose(
            photo.pixels, (cut / 255 - 0.5) / 0.25, atol=2.5 / (255 * 0.25)
        )
        assert photo.pixels.dtype == np.float32
        assert photo.box == (21.0, 6.0, 69.0, 54.0) and photo.size == (90, 60)
        assert photo.view.shape == (480, 480, 3)

    def test_squash_sees_it_all(self):
        image = Image.fromarray(gradient_image(90, 60))
        photo = images.prepare(image, Preprocessing(), fit="squash")
        assert photo.box == (0.0, 0.0, 90.0, 60.0)
        assert photo.view.shape == (320, 480, 3)
        assert photo.pixels.shape == (32, 32, 3)
        # Red runs from 0 to 255 over the whole width.
        assert photo.pixels[16, 0, 0] < -1.9 and photo.pixels[16, -1, 0] > 1.9

    @pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 3), (2, 1)])
    @pytest.mark.parametrize("fit", images.FITS)
    def test_any_size_and_aspect(self, size, fit):
        image = Image.new("RGB", size, (255, 128, 0))
        photo = images.prepare(image, Preprocessing(), fit=fit)
        assert photo.pixels.shape == (32, 32, 3)
        np.testing.assert_allclose(photo.pixels[..., 0], 2.0, atol=1e-5)
        assert max(photo.view.shape[:2]) == 480 and min(photo.view.shape) >= 1

    def test_unknown_fit(self):
        with pytest.raises(ValueError, match="fit='stretch'"):
            images.crop_box((3, 3), share=1.0, fit="stretch")
