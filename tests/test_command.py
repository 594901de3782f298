"""How a command ends: what its user did, what its user may mend, what is our fault."""

import os
import subprocess
import sys
import textwrap

import pytest

from train import command, errors

KINDS = (
    errors.ConfigError,
    errors.DatasetError,
    errors.CheckpointError,
    errors.DiskError,
    errors.CompileError,
)


def ending(error):
    """The exit status of a command that raises the error."""

    @command.run
    def main():
        raise error

    return main()


def run(body):
    """A command of its own process; stdout is closed before it ends."""
    program = f"""
        import sys
        from train import command

        @command.run
        def main():
            {body}

        sys.exit(main())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    return process.wait(60), told


class TestRun:
    def test_passes_arguments_and_status_on(self):
        assert command.run(lambda *args, **options: (args, options))(1, a=2) == (
            (1,),
            {"a": 2},
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_users_mistake_is_one_line_and_two(self, kind, capsys):
        assert ending(kind("no such\n  thing")) == 2
        assert capsys.readouterr().err == "error: no such thing\n"

    def test_an_interrupt_is_one_line_and_130(self, capsys):
        assert ending(KeyboardInterrupt()) == 130
        assert capsys.readouterr().err == "stopped; the same command goes on\n"

    def test_a_fault_keeps_its_traceback_and_asks_for_a_report(self):
        status, told = run("[][0]")
        assert status == 1
        assert told.startswith("Traceback") and "IndexError" in told
        assert told.splitlines()[-1] == command.REPORT

    def test_a_plain_value_error_is_a_fault(self):
        with pytest.raises(ValueError, match="inner") as info:
            ending(ValueError("inner"))
        assert info.value.__notes__ == [command.REPORT]

    def test_a_reader_that_has_gone_is_not_told(self):
        assert run("print(100_000 * 'long')") == (141, "")

    def test_a_system_without_utf_8_gets_escapes_and_whole_files(self, tmp_path):
        program = f"""
            import pathlib
            from train import command, files

            @command.run
            def main():
                print(chr(0x43a))
                files.write_text(pathlib.Path({str(tmp_path / "a.md")!r}), chr(0x2191))

            main()
        """
        plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd(), **plain},
        )
        assert (process.stdout, process.stderr) == ("\\u043a\n", "")
        assert (tmp_path / "a.md").read_text(encoding="utf-8") == "\u2191"


@pytest.mark.parametrize("kind", KINDS)
def test_callers_may_catch_value_errors(kind):
    assert issubclass(kind, errors.UserError) and issubclass(kind, ValueError)
