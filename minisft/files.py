"""Paths and files that somebody else named or wrote.

A path is checked before it is used, and only regular files are opened: to open a pipe, a device or a socket may wait for ever,
or change something. Links to files are followed; the hub's cache is made of them.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from minisft.errors import CONFIG, DATA, SAVE, UserError, shortened

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, as on Linux
MAX_BYTES = 64 * 2**20  # of a file that is read whole
BLOCK = 2**20  # bytes that are read at a time
KINDS = {  # what a path may name instead of a file
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def checked_path(path: str | Path, what: str, *, exit_code: int = CONFIG) -> str:
    """The path with the home folder in place of ~. what: names it in messages, as in "run.toml: output_dir".

    Raises UserError for text that cannot be a path: it is empty, too long, not UTF-8, has a NUL or an unknown user's ~.
    """
    text = os.path.expanduser(path)
    problem = ""
    if not text:
        problem = "the path is empty"
    elif "\0" in text:
        problem = "a path has no NUL character"
    elif text.startswith("~"):
        problem = f"there is no home folder {shortened(text.partition('/')[0], 60)}; write ./~ for a file of that name"
    else:
        try:
            size = len(text.encode("utf-8"))
            longest = max(len(name.encode("utf-8")) for name in text.split("/"))
            if size > LONGEST_PATH or longest > LONGEST_NAME:
                problem = f"a path has at most {LONGEST_PATH:,} bytes, {LONGEST_NAME} between two slashes"
        except UnicodeEncodeError:
            problem = "the path is not UTF-8 text, and could not be recorded"
    if problem:
        raise UserError(f"{what} = {shortened(repr(os.fspath(path)), 100)}: {problem}", exit_code=exit_code)
    return text


def file_to_write(path: str, option: str) -> str:
    """`checked_path` of a file that a command writes at its end. UserError for what would fail only then."""
    text = checked_path(path, option)
    if not os.path.isdir(os.path.dirname(os.path.abspath(text))):
        raise UserError(f"{option} {path}: there is no such folder", hint="make it first, or name another file")
    if os.path.isdir(text):
        raise UserError(f"{option} {path}: it is a folder", hint="name a file")
    return text


def is_there(path: str | Path) -> bool:
    """Like os.path.lexists. UserError where a folder on the way may not be searched: what is in it is not missing."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL
        return False
    except OSError as error:
        hint = "see to the permissions and the disk, then give the same command again"
        raise UserError(f"{path}: {error.strerror}", hint=hint, exit_code=SAVE) from None
    return True


def require_file(path: str | Path, *, exit_code: int = DATA) -> None:
    """Raises UserError unless the path names a regular file, or a link to one."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}", exit_code=exit_code) from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: {KINDS.get(stat.S_IFMT(mode), 'something')}, not a regular file", exit_code=exit_code)


def without_model(path: str | Path, hint: str) -> tuple[str, str]:
    """What is wrong with a path that is neither a model folder nor the folder of a run with a model, and what to do.

    hint: what to do where it is no run that has not finished.
    """
    path = Path(path)
    if not path.is_dir():
        return "is no folder", hint
    places = [step for pattern in ("checkpoints/step-*", "step-*") for step in path.glob(pattern)]
    if steps := [step for step in places if step.name[5:].isdecimal() and _has_model(step)]:
        newest = max(steps, key=lambda step: step.name)
        return (
            "holds no model yet: its run has not finished",
            f"finish the run, or name its newest checkpoint, {newest}",
        )
    runs = [
        run.parent for run in path.glob("*-*/model") if run.parent.name.split("-")[0].isdecimal() and _has_model(run)
    ]
    if runs:
        last = max(runs, key=lambda run: int(run.name.split("-")[0]))
        return "holds no model, but the runs of several stages", f"name one of them, as {last}"
    return "holds no model", hint


def _has_model(folder: Path) -> bool:
    return is_there(folder / "config.json") or is_there(folder / "adapter_config.json")


def open_file(path: str | Path, *, exit_code: int = DATA) -> BinaryIO:
    """A regular file, to be read. Raises UserError."""
    require_file(path, exit_code=exit_code)
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", exit_code=exit_code) from None


def read_file(path: str | Path, *, exit_code: int = DATA, at_most: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file. Raises UserError, also if there are more than `at_most`."""
    with open_file(path, exit_code=exit_code) as file:
        try:
            data = bytes(read_up_to(file, at_most + 1))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}", exit_code=exit_code) from None
    if len(data) > at_most:
        raise UserError(f"{path}: more than {at_most:,} bytes; such a file is not read", exit_code=exit_code)
    return data


def read_up_to(file: BinaryIO, count: int) -> bytearray:
    """At most so many bytes of a file. To read them at once would reserve the memory for all of them, however short it is."""
    data = bytearray()
    while part := file.read(min(BLOCK, count - len(data))):
        data += part
    return data
