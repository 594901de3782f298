"""Which files of folders, links and wildcards are photos."""

import os

import pytest
from PIL import Image

from ibsgl_jax.app import photos
from tests.quick_explain import save_photo


def found_in(folder, *arguments):
    """(sources, failures, skipped), relative to the folder."""
    found = photos.find([str(argument) for argument in arguments])
    sources = [os.path.relpath(source.path, folder) for source in found.sources]
    return sources, found.failures, [path.name for path in found.skipped]


class TestFind:
    def test_files_folders_and_wildcards(self, tmp_path):
        for name in ("b.PNG", "a.jpg", "inner/c.webp"):
            save_photo(tmp_path / name)
        (tmp_path / "notes.txt").write_text("notes")
        paths, failures, skipped = found_in(tmp_path, tmp_path)
        assert paths == ["a.jpg", "b.PNG", "inner/c.webp"]
        assert not failures and skipped == ["notes.txt"]
        order = (f"{tmp_path}/b.*", f"{tmp_path}/a.jpg", tmp_path)
        assert found_in(tmp_path, *order)[0] == ["b.PNG", "a.jpg", "inner/c.webp"]
        paths, failures, _ = found_in(tmp_path, f"{tmp_path}/*.bmp", f"{tmp_path}/x")
        assert not paths and "no file matches" in failures[0]
        assert "x: no such file" in failures[1]
        (tmp_path / "bare").mkdir()
        assert "no images" in found_in(tmp_path, tmp_path / "bare")[1][0]

    def test_a_name_with_brackets_is_a_file_first(self, tmp_path):
        save_photo(tmp_path / "a[1].jpg")
        assert found_in(tmp_path, tmp_path / "a[1].jpg")[0] == ["a[1].jpg"]

    @pytest.mark.parametrize(
        "name, kind",
        [
            ("web.jfif", "JPEG"),
            ("scan.jp2", "JPEG2000"),
            ("icon.ico", "ICO"),
            ("old.pcx", "PCX"),
            ("old.tga", "TGA"),
            ("noextension", "PNG"),
            ("wrong.txt", "WEBP"),
            ("wrong.jpg", "GIF"),
            ("deep.dds", "DDS"),
            ("plain.qoi", "QOI"),
        ],
    )
    def test_whatever_pillow_opens(self, tmp_path, name, kind):
        image = Image.new("RGB", (16, 16), "red")
        image.save(tmp_path / name, format=kind)
        assert found_in(tmp_path, tmp_path) == ([name], [], [])

    def test_what_is_no_image_is_skipped_and_named(self, tmp_path):
        save_photo(tmp_path / "a.png")
        heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
        contents = {
            "phone.heic": heic,
            "empty.txt": b"",
            "zeros.bin": bytes(5000),
            "tga-like.bin": bytes([0, 0, 2, *[0] * 9, 4, 0, 4, 0, 24, 0]) + bytes(99),
            "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "P3 list": b"P3 is the third priority",
        }
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        (tmp_path / "gone.png").symlink_to("nothing")
        paths, failures, skipped = found_in(tmp_path, tmp_path)
        assert paths == ["a.png"] and not failures
        assert set(skipped) == {*contents, "pipe.png", "zero.png", "gone.png"}

    def test_a_damaged_photo_of_a_folder_is_a_failure(self, tmp_path):
        (tmp_path / "text.jpg").write_text("no image")
        (tmp_path / "empty.png").touch()
        paths, failures, _ = found_in(tmp_path, tmp_path)
        assert not paths and len(failures) == 2
        assert "empty.png: the file is empty" in failures[0]
        assert "text.jpg: not an image" in failures[1]

    def test_hidden_ones_are_left_out(self, tmp_path):
        for name in ("a.png", ".b.png", ".cache/c.png"):
            save_photo(tmp_path / name)
        assert found_in(tmp_path, tmp_path) == (["a.png"], [], [])
        assert found_in(tmp_path, tmp_path / ".cache")[0] == [".cache/c.png"]

    def test_a_device_is_not_read(self, tmp_path):
        _, failures, _ = found_in(tmp_path, "/dev/zero")
        assert failures == ["/dev/zero: is a device, not a file"]


class TestLinks:
    def make(self, tmp_path):
        """photos/ with links to a folder beside it, to itself and to its parent."""
        folder = tmp_path / "photos"
        save_photo(folder / "own.png")
        save_photo(folder / "deep" / "d.png")
        save_photo(tmp_path / "real" / "in_link.png")
        (folder / "sub").symlink_to("../real")
        (folder / "photo.png").symlink_to("../real/in_link.png")
        for i in range(8):  # 2^40 ways to walk in circles
            (folder / f"self{i}").symlink_to(".")
            (folder / "deep" / f"up{i}").symlink_to("..")
        return folder

    NAMES = ["own.png", "photo.png", "deep/d.png", "sub/in_link.png"]

    def test_folders_are_followed_and_loops_end(self, tmp_path):
        folder = self.make(tmp_path)
        assert found_in(folder, folder) == (self.NAMES, [], [])
        (tmp_path / "to_photos").symlink_to("photos")
        paths, failures, _ = found_in(tmp_path, tmp_path / "to_photos")
        assert len(paths) == 4 and not failures

    @pytest.mark.parametrize("pattern", ["**", "**/*", "**/*.png", "*/../**/*.png"])
    def test_wildcards_end_too(self, tmp_path, pattern):
        folder = self.make(tmp_path)
        paths, failures, _ = found_in(folder, f"{folder}/{pattern}")
        assert not failures
        assert {os.path.realpath(folder / p) for p in paths} >= {
            os.path.realpath(folder / name) for name in self.NAMES
        }

    def test_two_double_stars(self, tmp_path):
        folder = self.make(tmp_path)
        paths, _, _ = found_in(folder, f"{tmp_path}/**/deep/**/*.png")
        assert "deep/d.png" in paths
