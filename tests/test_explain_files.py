"""Whose files the command writes, and what is left when something goes wrong."""

import errno
import fcntl
import io
import os
import resource
import shutil
import signal
import sys

import numpy as np
import pytest

from ibsgl_jax.app import cli, drawing, outputs
from ibsgl_jax.app import explain as explaining
from tests.quick_explain import (
    check_maps,
    explanation,
    picture,
    quick,  # noqa: F401
    save_photo,
    snapshot,
)


@pytest.fixture
def explain(quick):  # noqa: F811
    return quick


class TestNobodysFileIsWrittenOver:
    def refused(self, explain, folder, *arguments, line, **options):
        before = snapshot(folder)
        status, stdout, stderr = explain(*arguments, **options)
        (only,) = stderr.splitlines()
        assert status == 2 and line in only and "choose another --out" in only
        assert snapshot(folder) == before and stdout == ""

    @pytest.mark.parametrize("out", [".", "../photos", "link", "inner/..", "/{}"])
    def test_an_input(self, explain, tmp_path, out):
        photos = tmp_path / "photos"
        for name in ("a.png", "a_grad_cam.png", "contact_sheet.png"):
            save_photo(photos / name)
        (photos / "inner").mkdir()
        (photos / "link").symlink_to(".")
        os.chdir(photos)
        out = str(photos) if out == "/{}" else out
        self.refused(explain, tmp_path, ".", "--out", out, line="is an input")

    def test_an_input_that_is_a_link_or_a_hard_link(self, explain, tmp_path):
        real = save_photo(tmp_path / "real.png")
        out = tmp_path / "out"
        explain(real, "--out", out)
        result = out / "real_grad_cam.png"
        shutil.copy(real, tmp_path / "photo.png")
        os.replace(tmp_path / "photo.png", result)
        (tmp_path / "soft.png").symlink_to(result)
        os.link(result, tmp_path / "hard.png")
        for name in ("soft.png", "hard.png"):
            arguments = (real, tmp_path / name, "--out", out)
            self.refused(explain, tmp_path, *arguments, line="is an input")

    @pytest.mark.parametrize(
        "name", ["explanation.json", "maps.npz", "contact_sheet.png", "a_grad_cam.png"]
    )
    @pytest.mark.parametrize("kind", ["file", "link", "dangling", "folder", "picture"])
    def test_any_file_of_somebody_else(self, explain, tmp_path, name, kind):
        photo = save_photo(tmp_path / "a.png")
        out = tmp_path / "out"
        out.mkdir()
        (tmp_path / "precious.txt").write_text("precious")
        if kind == "file":
            (out / name).write_text('{"format": "mine"}')
        elif kind == "link":
            (out / name).symlink_to("../precious.txt")
        elif kind == "dangling":
            (out / name).symlink_to("../nothing")
        elif kind == "folder":
            (out / name).mkdir()
        else:
            (out / name).write_bytes(picture())  # a result copied from elsewhere
        line = f"{name} is there already"
        self.refused(explain, tmp_path, photo, "--out", out, line=line)

    @pytest.mark.parametrize("out", ["gs://bucket/x", "S3://b", "file:///tmp/x"])
    def test_an_address_is_no_folder(self, explain, tmp_path, out):
        photo = save_photo(tmp_path / "a.png")
        before = snapshot(tmp_path)
        status, _, stderr = explain(photo, "--out", out)
        assert status == 2 and "is an address, not a folder" in stderr
        assert snapshot(tmp_path) == before and len(stderr.splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]

    def test_a_result_that_somebody_replaced(self, explain, tmp_path):
        photo = save_photo(tmp_path / "a.png")
        out = tmp_path / "out"
        assert explain(photo, "--out", out)[0] == 0
        edited = picture(size=(200, 90))
        (out / "a_grad_cam.png").write_bytes(edited)
        line = "a_grad_cam.png is there already"
        self.refused(explain, tmp_path, photo, "--out", out, line=line)
        os.unlink(out / "a_grad_cam.png")
        assert explain(photo, "--out", out)[0] == 0

    def test_its_own_results_are_replaced(self, explain, tmp_path):
        photos = [save_photo(tmp_path / f"{name}.png") for name in "abc"]
        out = tmp_path / "out"
        assert explain(*photos, "--out", out)[0] == 0
        assert explain(photos[0], "--out", out)[0] == 0
        assert explain(*photos, "--out", out, methods="grad_cam,hirescam")[0] == 0
        assert check_maps(out, ("grad_cam", "hirescam")) == 3

    def test_a_file_that_comes_meanwhile_stays(self, explain, tmp_path, monkeypatch):
        photos = [save_photo(tmp_path / f"{name}.png") for name in "ab"]
        out = tmp_path / "out"

        def overlay(panel, *, title):
            (out / "b_grad_cam.png").write_text("precious")
            return picture()

        monkeypatch.setattr(drawing, "overlay", overlay)
        status, _, stderr = explain(*photos, "--out", out)
        assert status == 2 and "meanwhile" in stderr
        assert (out / "b_grad_cam.png").read_text() == "precious"
        assert check_maps(out) == 1

    def test_what_a_killed_run_left_is_replaced(self, explain, tmp_path, monkeypatch):
        photos = [save_photo(tmp_path / f"{name}.png") for name in "abc"]
        out = tmp_path / "out"
        assert explain(photos[0], "--out", out)[0] == 0
        with monkeypatch.context() as patch:
            # As after `kill -9`: nothing is finished, nothing is cleared away.
            patch.setattr(explaining.Results, "_finish", lambda *a, **k: None)
            patch.setattr(
                outputs.OutputFolder, "close", lambda self: self._maps.close()
            )
            patch.setattr(drawing, "overlay", lambda *a, **k: picture(size=(20, 20)))
            explain(*photos, "--out", out)
        assert not explanation(out)["complete"]
        assert [p.name for p in out.iterdir() if p.name.startswith(".ibsgl-")]
        assert explain(*photos, "--out", out)[0] == 0
        assert check_maps(out) == 3
        assert not [p for p in out.iterdir() if p.name.startswith(".")]

    def test_a_second_run_at_the_same_time_is_refused(self, explain, tmp_path):
        photo = save_photo(tmp_path / "a.png")
        out = tmp_path / "out"
        assert explain(photo, "--out", out)[0] == 0
        holder = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(holder, fcntl.LOCK_EX)
            self.refused(
                explain, tmp_path, photo, "--out", out, line="another `ibsgl explain`"
            )
        finally:
            os.close(holder)
        assert explain(photo, "--out", out)[0] == 0

    def test_names_that_differ_in_case_only(self, explain, tmp_path):
        photos = [save_photo(tmp_path / name) for name in ("x/A.png", "y/a.png")]
        out = tmp_path / "out"
        assert explain(*photos, "--out", out)[0] == 0
        files = [photo["files"]["grad_cam"] for photo in explanation(out)["photos"]]
        assert len({file.casefold() for file in files}) == 2

    def test_names_that_collide_through_the_method(self, explain, tmp_path):
        names = ("a.png", "a_input_x.png", "contact.png", "maps.png")
        photos = [save_photo(tmp_path / name) for name in names]
        methods = ("gradient", "input_x_gradient")
        out = tmp_path / "out"
        assert explain(*photos, "--out", out, methods=",".join(methods))[0] == 0
        files = [f for p in explanation(out)["photos"] for f in p["files"].values()]
        assert len(set(files)) == 8 and check_maps(out, methods) == 4


class TestWhatIsLeft:
    def photos(self, tmp_path, count=5):
        return [save_photo(tmp_path / "photos" / f"{i}.png") for i in range(count)]

    def at_photo(self, monkeypatch, number, error):
        """The overlay of that photo raises."""
        calls = []

        def overlay(panel, *, title):
            calls.append(title)
            if len(calls) == number:
                raise error
            return picture()

        monkeypatch.setattr(drawing, "overlay", overlay)

    @pytest.mark.parametrize("number", [1, 3, 5])
    def test_after_ctrl_c(self, explain, tmp_path, monkeypatch, number):
        photos = self.photos(tmp_path)
        self.at_photo(monkeypatch, number, KeyboardInterrupt())
        out = tmp_path / "out"
        status, stdout, stderr = explain(*photos, "--out", out, "--chunk-size", 2)
        assert status == 130 and stdout == ""
        last = stderr.splitlines()[-1]
        assert f"interrupted: {number - 1} of 5 photos are explained" in last
        told = explanation(out)
        assert not told["complete"] and len(told["photos"]) == number - 1
        if number > 1:
            assert check_maps(out) == number - 1
            assert (out / "contact_sheet.png").exists()
        assert {p.name for p in out.iterdir()} == {"explanation.json", *told["written"]}

    def test_after_sigterm(self, explain, tmp_path, monkeypatch):
        calls = []

        def overlay(panel, *, title):
            calls.append(title)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return picture()

        monkeypatch.setattr(drawing, "overlay", overlay)
        out = tmp_path / "out"
        status, _, stderr = explain(*self.photos(tmp_path), "--out", out)
        assert status == 143
        assert "interrupted: 2 of 5 photos" in stderr.splitlines()[-1]
        assert check_maps(out) == 2 and not explanation(out)["complete"]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    def test_after_a_full_disk(self, explain, tmp_path, monkeypatch, code):
        self.at_photo(monkeypatch, 3, OSError(code, os.strerror(code), "x.png"))
        out = tmp_path / "out"
        status, _, stderr = explain(*self.photos(tmp_path), "--out", out)
        assert status == 2
        assert "x.png: cannot be written" in stderr and "2 of 5 photos" in stderr
        assert check_maps(out) == 2

    def test_without_room_for_the_maps_nothing_begins(self, explain, tmp_path):
        photos = self.photos(tmp_path, 200)  # 51 kB of maps
        out = tmp_path / "new" / "out"
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
        try:
            status, _, stderr = explain(*photos, "--out", out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        (line,) = stderr.splitlines()
        assert status == 2 and "no room for the maps of 200 photos" in line
        assert not out.exists()

    def test_one_photo_that_cannot_be_written(self, explain, tmp_path, monkeypatch):
        self.at_photo(monkeypatch, 2, OSError(errno.EIO, "Input/output error", "1.png"))
        out = tmp_path / "out"
        status, _, stderr = explain(*self.photos(tmp_path), "--out", out)
        assert status == 2 and "1 not explained" in stderr and "Input/output" in stderr
        assert check_maps(out) == 4 and explanation(out)["complete"]

    def test_of_failed_and_good_photos(self, explain, tmp_path):
        photos = self.photos(tmp_path, 23)
        for i in (0, 7, 8, 22):
            photos[i].write_bytes(b"no image")
        out = tmp_path / "out"
        status, _, _ = explain(*photos, "--out", out, methods="grad_cam,hirescam")
        assert status == 2 and check_maps(out, ("grad_cam", "hirescam")) == 19
        assert len(explanation(out)["failed"]) == 4
        sheets = {p.name for p in out.glob("contact_sheet*")}
        assert sheets == {"contact_sheet.png", "contact_sheet_2.png"}

    def test_a_photo_goes_while_the_command_runs(self, explain, tmp_path, monkeypatch):
        photos = self.photos(tmp_path)

        def overlay(panel, *, title):
            photos[4].unlink(missing_ok=True)
            return picture()

        monkeypatch.setattr(drawing, "overlay", overlay)
        out = tmp_path / "out"
        status, _, stderr = explain(*photos, "--out", out, "--chunk-size", 2)
        assert status == 2 and "4.png: no such file" in stderr
        assert check_maps(out) == 4

    def test_a_bug_keeps_its_traceback_and_the_results(
        self, explain, tmp_path, monkeypatch, capsys
    ):
        self.at_photo(monkeypatch, 3, RuntimeError("a bug"))
        out = tmp_path / "out"
        photos = map(str, self.photos(tmp_path))
        status = cli.main(["explain", *photos, "--method=grad_cam", f"--out={out}"])
        stderr = capsys.readouterr().err
        assert status == 1 and "RuntimeError: a bug" in stderr
        assert "please report" in stderr.splitlines()[-1]
        assert check_maps(out) == 2 and not explanation(out)["complete"]


class TestNames:
    ODD = (
        "cost $5^^_$ x",
        "a_b^{c}",
        "$\\frac{1}{",
        "100 % & #",
        "two\nlines\r\t",
        "\x1b[31mred\x1b[0m",
        "caf\udce9",
        "\u202eright to left",
        "\u65e5\u672c",
        "-x",
        "[a]*?",
        " ",
    )

    def test_are_text(self, explain, tmp_path):
        folder = tmp_path / "odd"
        for i, name in enumerate(self.ODD):
            save_photo(tmp_path / "a.png").rename(tmp_path / f"{i}")
            folder.mkdir(exist_ok=True)
            os.rename(tmp_path / f"{i}", folder / f"{name}.png")
        (folder / "bad\x1b[2J\n.jpg").write_text("no image")
        out = tmp_path / "out"
        status, stdout, stderr = explain(folder, "--out", out)
        assert status == 2 and check_maps(out) == len(self.ODD)
        for text in (stdout, stderr, (out / "explanation.json").read_text()):
            text.encode()
            assert "\x1b" not in text and "\\ud" not in text
        assert "bad\\x1b[2J\\n.jpg: not an image" in stderr
        told = [photo["path"] for photo in explanation(out)["photos"]]
        assert any(path.endswith("caf\ufffd.png") for path in told)
        assert any(path.endswith("two\\nlines\\r\\t.png") for path in told)
        for name in os.listdir(out):
            name.encode()
            assert name.isprintable()

    @pytest.mark.parametrize("letter", ["x", "\u00e9", "\u65e5"])
    def test_long_ones_are_shortened(self, explain, tmp_path, letter):
        size = len(letter.encode())
        names = [letter * (240 // size) + end for end in ("1.png", "2.png")]
        photos = [save_photo(tmp_path / name) for name in (*names, "a.png")]
        out = tmp_path / "out"
        status, _, _ = explain(*photos, "--out", out, methods="integrated_gradients")
        assert status == 0 and check_maps(out, ("integrated_gradients",)) == 3
        notes = ["shortened" in p.get("note", "") for p in explanation(out)["photos"]]
        assert notes == [True, True, False]

    def test_of_options_are_escaped_too(self, explain, tmp_path):
        photo = save_photo(tmp_path / "a.png")
        status, _, stderr = explain(photo, "--class", "\x1b[2J\nred")
        assert status == 2 and len(stderr.splitlines()) == 1 and "\x1b" not in stderr


class TestOwnResults:
    def test_are_left_out_of_a_search(self, explain, tmp_path):
        os.chdir(tmp_path)
        for name in ("a.png", "b.png", "inner/c.png"):
            save_photo(tmp_path / name)
        assert explain(".")[0] == 0
        assert explain(".", "--out", "inner/more")[0] == 0
        status, _, stderr = explain(".", methods="grad_cam,hirescam")
        assert status == 0 and "left out, results of earlier runs (12): " in stderr
        told = explanation(tmp_path / "explained")
        assert [p["path"] for p in told["photos"]] == ["a.png", "b.png", "inner/c.png"]
        assert told["results_left_out"] == 12 and not told["skipped"]

    def test_are_known_wherever_they_go(self, explain, tmp_path):
        photo = save_photo(tmp_path / "photos" / "a.png")
        assert explain(photo, "--out", tmp_path / "out")[0] == 0
        shutil.copy(tmp_path / "out" / "a_grad_cam.png", tmp_path / "photos" / "x.png")
        status, _, stderr = explain(tmp_path / "photos", "--out", tmp_path / "new")
        assert status == 0 and "earlier runs (1): " in stderr
        assert len(explanation(tmp_path / "new")["photos"]) == 1

    def test_named_by_a_shell_that_expanded_a_wildcard(self, explain, tmp_path):
        os.chdir(tmp_path)
        save_photo(tmp_path / "a.png")
        assert explain("a.png", "--out", ".")[0] == 0
        names = sorted(p.name for p in tmp_path.glob("*.png"))
        assert len(names) == 3
        assert explain(*names, "--out", ".")[0] == 0
        assert check_maps(tmp_path) == 1
        status, _, stderr = explain("a_grad_cam.png")
        assert status == 2 and "no photo to explain" in stderr

    def test_another_programs_marker_hides_nothing(self, explain, tmp_path):
        save_photo(tmp_path / "photos" / "a.png")
        for text in ('{"written": {"a.png": 3}}', "[]", "{", "[" * 100_000):
            (tmp_path / "photos" / "explanation.json").write_text(text)
            out = tmp_path / "out"
            assert explain(tmp_path / "photos", "--out", out)[0] == 0
            assert len(explanation(out)["photos"]) == 1


class TestPipes:
    def test_a_pipe_is_read(self, explain, tmp_path):
        data = save_photo(tmp_path / "a.png").read_bytes()
        read, write = os.pipe()
        os.write(write, data)
        os.close(write)
        try:
            status, _, _ = explain(f"/dev/fd/{read}", "--out", tmp_path / "out")
        finally:
            os.close(read)
        assert status == 0 and check_maps(tmp_path / "out") == 1

    def test_an_empty_pipe_is_one_line(self, explain, tmp_path, monkeypatch):
        monkeypatch.setattr("ibsgl_jax.app.photos.PIPE_SECONDS", 0.1)
        os.mkfifo(tmp_path / "pipe")
        status, _, stderr = explain(tmp_path / "pipe")
        assert status == 2 and "nothing came through the pipe" in stderr

    def test_standard_input(self, explain, tmp_path, monkeypatch):
        data = save_photo(tmp_path / "a.png").read_bytes()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert explain("-", "--out", tmp_path / "out")[0] == 0
        assert explanation(tmp_path / "out")["photos"][0]["path"] == "stdin"


class TestMapsFile:
    def test_memory_of_one_map(self, tmp_path):
        # 400 maps of 224 x 224 are 80 MB; a tenth of that is a lot.
        import tracemalloc

        from ibsgl_jax.app.maps_file import MapsFile

        tracemalloc.start()
        file = MapsFile(tmp_path / "maps.npz", ["a", "b"], 200, (224, 224))
        for i in range(150):
            values = np.full((224, 224), i, np.float32)
            file.write(i, {"a": values, "b": -values})
        file.finish(150)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6
        with np.load(tmp_path / "maps.npz") as maps:
            for name, sign in (("a", 1), ("b", -1)):
                assert maps[name].shape == (150, 224, 224)
                np.testing.assert_array_equal(
                    maps[name][:, 5, 5], sign * np.arange(150)
                )

    def test_an_existing_file_is_left_alone(self, tmp_path):
        from ibsgl_jax.app.maps_file import MapsFile

        (tmp_path / "maps.npz").write_text("precious")
        with pytest.raises(FileExistsError):
            MapsFile(tmp_path / "maps.npz", ["a"], 2, (3, 3))
        assert (tmp_path / "maps.npz").read_text() == "precious"
