"""The one way to report a user's mistake, and the last resort for everything else.

A `UserError` says what is wrong, with the values, and what to do next. The commands print it as two lines and exit with
its code; nobody sees a traceback for a mistake of their own. Internal invariants use `assert`.

What nobody foresaw (a bug of ours, of a library, or no memory left) is two lines too, and a file with the traceback.
"""

import io
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EPERM, EROFS, ESTALE
from pathlib import Path

CONFIG = 2  # the configuration or the command line
DATA = 65  # a data file or a row
MODEL = 66  # model or tokenizer files
PEER = 69  # another rank is gone
INTERNAL = 70  # nobody foresaw it: a bug of ours, or of a library
MEMORY = 71  # not enough memory
SAVE = 74  # the disk: checkpoints could not be written, or a file not be read
STOPPED = 75  # by a signal or control.toml, before the first step or after saving; the same command resumes
NONFINITE = 76  # a loss or gradient that is not finite, or a spike

DISK = (ENOSPC, EDQUOT, EFBIG, EACCES, EPERM, EROFS, EIO, ESTALE)  # an OSError of the disk, not of the program
# In the texts of RuntimeErrors: of the CPU's allocator, of mmap, of CUDA and Triton, of cuBLAS.
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
LONGEST_MESSAGE = 4000  # characters that are printed: some are about a text of megabytes
VERSIONS = ("torch", "triton", "numpy", "tokenizers", "safetensors", "jinja2")  # that a report names, if imported


class UserError(ValueError):
    """A mistake that the user can correct.

    message: what is wrong, with the values. hint: what to do next. exit_code: one of the constants above.
    """

    def __init__(self, message: str, *, hint: str = "", exit_code: int = CONFIG):
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class Stopped(KeyboardInterrupt):
    """A signal has ended the process, where nothing is lost by that (signals.py). Ctrl-C in a notebook looks as it always does.

    exit_code: 75 where the same command goes on, else 128 + the number of the signal.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def rank_name() -> str:
    """This process among those of a launcher (torchrun): "rank 1 on host-b"; "" if it is the only one."""
    is_alone = os.environ.get("WORLD_SIZE", "") in ("", "1")
    return "" if is_alone else f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()}"


def number_of_ranks() -> int:
    """How many processes a launcher (torchrun) says it has started together; 1 without one. Raises UserError."""
    text = os.environ.get("WORLD_SIZE", "") or "1"
    if not text.isdecimal() or not 1 <= int(text) <= 10**6:
        hint = "a launcher such as torchrun sets it; unset it to train in one process"
        raise UserError(f"WORLD_SIZE = {text[:60]!r} in the environment: expected a number of processes", hint=hint)
    return int(text)


def tell(text: str) -> None:
    """Print on stderr, without control characters: names in files may hold commands for a terminal. Where stderr is a file on a
    full disk, the program goes on without it."""
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in shortened(text, LONGEST_MESSAGE))
    with suppress(OSError):
        print(" ".join(filter(None, ["minisft:", rank_name() and f"[{rank_name()}]", shown])), file=sys.stderr)


def warn(message: str) -> None:
    tell(f"WARNING {message}")


def run_command(command: Callable[[], int]) -> int:
    """Call a command and return its exit code. Whatever is raised becomes two lines on stderr, and no traceback."""
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # as stderr does, where the encoding lacks a character of the data
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command()
        sys.stdout.flush()
        return code
    except UserError as error:
        tell(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has ended, as in `... --help | head`
        return 141
    except Stopped as stopped:
        tell(str(stopped))
        return stopped.exit_code
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, OSError) and error.errno in DISK:
            hint = "check the disk, its free space and its permissions, then run the same command again"
            tell(f"error: {error.filename or 'disk'}: {error.strerror}\n  {hint}")
            return SAVE
        return _unforeseen(error)
    finally:
        _drop_what_cannot_be_written()


def _open_closed_streams() -> None:
    """Put the null device where stdin, stdout or stderr was closed, as `<&-` does. Else the next file that is opened has its
    number, and what a library prints is written into that file."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
            os.set_inheritable(null, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))


def _drop_what_cannot_be_written() -> None:
    """Else Python flushes stdout and stderr once more when it ends, complains, and replaces the exit code by 120."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, open(os.devnull, "w"))


@contextmanager
def reports_in(folder: str | Path) -> Iterator[None]:
    """The file about an error that nobody foresaw, raised inside, goes into this folder, if it exists by then."""
    try:
        yield
    except BaseException as error:
        if not hasattr(error, "report_folder"):
            error.report_folder = os.fspath(folder)  # pyright: ignore[reportAttributeAccessIssue]
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Python's or numpy's error; or torch's, CUDA's or Triton's, which have a class that is not imported here, or only a text."""
    text = str(error)[:1000]
    is_torchs = isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or is_torchs


def _unforeseen(error: BaseException) -> int:
    """Tell the error in two lines, write the traceback into a file, and return the exit code."""
    import traceback  # here, so that other commands start without it

    report = _write_report("".join(traceback.format_exception(error)), getattr(error, "report_folder", ""))
    where = f"the traceback is in {report}" if report else "the traceback could not be written to a file"
    what = shortened(" ".join(f"{type(error).__name__}: {error}".split()), 300)
    if is_out_of_memory(error):
        tell(f"error: out of memory ({what})\n  docs/debug.md says what to lower; {where}")
        return MEMORY
    tell(f"error: unexpected {what}\n  {where}; please report it")
    if not report:
        traceback.print_exception(error)
    return INTERNAL


def _write_report(text: str, folder: str) -> str:
    """The path of a new file with the traceback, "" if it cannot be written. Values of variables are not in it."""
    versions = {"python": sys.version.split()[0]}
    for name in ("minisft", *VERSIONS):
        if name in sys.modules:
            versions[name] = getattr(sys.modules[name], "__version__", "?")
    command = " ".join(sys.argv)
    try:
        import tempfile

        folder = folder if os.path.isdir(folder) else tempfile.gettempdir()
        handle, path = tempfile.mkstemp(prefix="minisft-error-", suffix=".txt", dir=folder)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join([command, " ".join(f"{name} {v}" for name, v in versions.items()), "", text]))
        return path
    except (OSError, MemoryError):
        return ""
