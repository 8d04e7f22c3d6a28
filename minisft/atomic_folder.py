"""Folders that are written so that a crash never leaves half of one, and the locks on them.

A set of files that belong together is written as an *atomic folder*: it has all its files or it does not exist. Renaming
each file into place is not enough. In 60 saves killed at a random moment, that left files of two different steps side by
side 48 times, overwriting in place spoiled 20, and one rename of the whole folder spoiled none. The order of the steps
makes it hold through a power cut too:

    mkdir .tmp-..., write and fsync every file, then manifest.json, fsync the folder, rename, fsync the parent

The manifest lists every file with its size and sha256 and carries its own sha256, so `verify_folder` notices any
changed byte, a lost file, and files of two folders mixed up. Rename is assumed to be atomic inside one file system.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from minisft.errors import DATA, SAVE, UserError
from minisft.strict_json import dump_json, parse_json, write_json
from minisft.units import size

MANIFEST = "manifest.json"
TEMPORARY = re.compile(r"\.(?:tmp|del)-.+-(?P<host>\w+)-(?P<pid>\d+)-[0-9a-f]{8}")
HOST = re.sub(r"\W", "_", socket.gethostname()) or "localhost"
MISSING = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
)  # there is no such file; any other error is the disk's

# ---- the disk ---------------------------------------------------------------------------------------------------


def sha256_file(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_file(path: Path | str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(path: Path | str) -> None:
    """Make the names in a folder durable: a file's own fsync does not cover its name, nor a rename."""
    try:
        fsync_file(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise


def make_folder(path: Path | str) -> None:
    """Like mkdir -p, and the new names are durable."""
    path = Path(path)
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def free_bytes(folder: Path | str) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def space(folder: Path | str, needed: int | None = None) -> str:
    """What is needed and what is free, for messages: "1.25 GB needed, 312 MB free"."""
    try:
        free = f"{size(free_bytes(folder))} free"
    except OSError as error:  # the trouble that is being told may be the disk's
        free = f"free space unknown ({error.strerror})"
    return free if needed is None else f"{size(needed)} needed, {free}"


def require_space(folder: Path | str, needed: int, what: str, *, hint: str) -> None:
    """Raise UserError (exit code SAVE) where less than `needed` bytes are free for `what`."""
    if free_bytes(folder) < needed:
        raise UserError(f"too little room for {what}: {space(folder, needed)}", hint=hint, exit_code=SAVE)


def remedy(reason: str) -> str:
    """What to do about a disk that refused to write, for hints. reason: in its words, maybe those of Rust or of another rank."""
    if any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        return "free some space"
    return "see to the disk, its mount and the permissions"


def not_written(path: Path | str, error: Exception, needed: int | None = None, *, hint: str = "") -> UserError:
    """The UserError (exit code SAVE) for an error of writing `path`, which needed so many bytes."""
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(
        f"{path} cannot be written: {reason}; {space(Path(path).parent, needed)}",
        hint=hint or f"{remedy(reason)}, or choose another place, and give the same command again",
        exit_code=SAVE,
    )


def not_read(path: Path | str, error: OSError) -> UserError:
    """The UserError (exit code SAVE) for a file that is there and cannot be read, which says nothing about what is in it."""
    return UserError(
        f"{path} cannot be read: {error.strerror or error}",
        hint="nothing is known to be wrong with it: see to the disk, its mount and the permissions, then give the same "
        "command again",
        exit_code=SAVE,
    )


def write_file(path: Path | str, text: str, *, hint: str = "") -> None:
    """Write a small file of UTF-8 text, whole or not at all; an earlier one is replaced.

    Raises UserError (exit code SAVE), with what was needed and what is free, where the disk refuses.
    """
    path, data = Path(path), text.encode("utf-8")
    temporary = _temporary("tmp", path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise not_written(path, error, len(data), hint=hint) from None


# ---- atomic folders -----------------------------------------------------------------------------------------------


def crash_point(name: str) -> None:
    """For tests: end the process here, as SIGKILL would, if MINISFT_CRASH_AT in the environment is this name.

    A save passes these points, in this order, each just after what it is named for. FOLDER is the folder's name (step-00000010,
    model, a token cache's hash), FILE a file in it.

        FOLDER begun             nothing is written yet
        FOLDER mkdir             the temporary folder is there
        FOLDER model             a checkpoint: so are the model and its tokenizer,
        FOLDER optimizer         the optimizer's state,
        FOLDER state             and trainer_state.json
        FOLDER fsync FILE        the file is on the disk; those of one process come in the order of their names
        FOLDER manifest          the manifest is there, on the disk
        FOLDER fsync             the names in the temporary folder are on the disk
        FOLDER aside             the folder that was there before has its new name
        FOLDER rename            the new folder is there, whole
        FOLDER fsync parent      its name is on the disk
        FOLDER later aside       a checkpoint of a later step, of a run that this one replaces, has its new name
        FOLDER del               retention: an old checkpoint is out of sight
        FOLDER fsync del         this is on the disk
        FOLDER rmtree            it is deleted
    """
    if os.environ.get("MINISFT_CRASH_AT") == name:
        os._exit(137)


def _temporary(kind: str, target: Path) -> Path:
    """A new hidden name beside `target` that tells which process made it."""
    return target.with_name(f".{kind}-{target.name}-{HOST}-{os.getpid()}-{secrets.token_hex(4)}")


def seal(path: Path, folder: Path, name: str) -> dict:
    """Put a file of a folder that will be `name` on the disk, with the permissions that the umask asks for; returns its entry in
    the manifest."""
    path.chmod(folder.stat().st_mode & 0o666)  # mkdir applied the umask; reading the umask itself would change it
    fsync_file(path)
    crash_point(f"{name} fsync {path.name}")
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


@contextmanager
def atomic_folder(
    target: Path | str,
    manifest: dict | None = None,
    *,
    move_existing_to: Path | None = None,
    sealed: dict[str, dict] | None = None,
) -> Iterator[Path]:
    """Yield a temporary folder to write into; on leaving it appears as `target` with everything in it, or not at all.

        with atomic_folder(out / "step-00000010", {"step": 10}) as folder:
            ...  # write files into folder

    `manifest`: the caller's own fields (JSON values) for manifest.json. `sealed`: what `seal` returned for files, by name; for
    all others it is called at the end. Both are read at the end, so they may be filled inside.
    Every file ends with the permissions that the umask asks for, whatever its writer set (safetensors sets 0600).
    Where `target` exists it is renamed to `move_existing_to` just before the new one appears; without that name it is
    a FileExistsError. On this and any other error nothing of the new folder is left.
    """
    target = Path(target)
    if move_existing_to is None and os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    make_folder(target.parent)
    folder = _temporary("tmp", target)
    crash_point(f"{target.name} begun")
    folder.mkdir()
    crash_point(f"{target.name} mkdir")
    try:
        yield folder
        files = dict(sealed or {})
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                fsync_folder(path)
            elif name not in files:
                files[name] = seal(path, folder, target.name)
        fields = {"format": "minisft folder 1", **(manifest or {}), "files": files}
        write_json(folder / MANIFEST, {**fields, "sha256": hashlib.sha256(dump_json(fields)).hexdigest()})
        crash_point(f"{target.name} manifest")
        fsync_folder(folder)
        crash_point(f"{target.name} fsync")
        if move_existing_to is not None and os.path.lexists(target):
            os.rename(target, move_existing_to)
            crash_point(f"{target.name} aside")
        os.rename(folder, target)
        crash_point(f"{target.name} rename")
        fsync_folder(target.parent)
        crash_point(f"{target.name} fsync parent")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def read_manifest(path: Path | str) -> dict:
    """The manifest of an atomic folder. Raises UserError (exit code DATA) where it is missing, changed, or not ours, and
    OSError where it cannot be read."""
    file = Path(path) / MANIFEST
    try:
        data = file.read_bytes()
    except MISSING as error:
        raise UserError(f"{file}: {error.strerror}", exit_code=DATA) from None
    manifest = parse_json(data, str(file))
    ours = isinstance(manifest, dict) and manifest.get("format") == "minisft folder 1"
    if not ours or not isinstance(manifest.get("files"), dict) or "sha256" not in manifest:
        raise UserError(f"{file}: not a manifest that minisft wrote", exit_code=DATA)
    fields = {key: value for key, value in manifest.items() if key != "sha256"}
    if data != dump_json(manifest) or hashlib.sha256(dump_json(fields)).hexdigest() != manifest["sha256"]:
        raise UserError(f"{file}: changed since it was written", exit_code=DATA)
    return manifest


def contents_id(path: Path | str) -> str | None:
    """One hash of the files of an atomic folder, as its manifest lists them; None for any other folder. Two folders with
    the same files have the same, whatever else their manifests say."""
    try:
        return hashlib.sha256(dump_json(read_manifest(path)["files"])).hexdigest()
    except UserError:
        return None


def verify_folder(path: Path | str, *, hashes: bool = True) -> str | None:
    """None where the folder is exactly what was written, else the reason why not.

    hashes=False compares only sizes, which costs no reading. Files that the manifest does not list are no concern: a
    viewer may have left them, and nothing here reads them. A file that is there and cannot be read (a failing disk, a lost
    mount, permissions) may well be whole: that is a UserError (exit code SAVE), and no reason to go on without the folder.
    """
    path = Path(path)
    file = path / MANIFEST
    try:
        for name, entry in read_manifest(path)["files"].items():
            file = path / name
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is no file"
            if status.st_size != entry["size"]:
                return f"{name} has {status.st_size} bytes, {entry['size']} were written"
            if hashes and sha256_file(file) != entry["sha256"]:
                return f"{name} does not have the sha256 it was written with"
    except UserError as error:
        return error.message.removeprefix(f"{path}/")
    except MISSING:
        return f"{file.relative_to(path)} is missing"
    except OSError as error:
        raise not_read(file, error) from error
    return None


def remove_folder(path: Path | str) -> None:
    """Delete an atomic folder of ours: out of sight by one rename first, so that no half of it is ever seen.

    Raises UserError, and deletes nothing, where `path` is a link or holds no manifest of ours.
    """
    path = Path(path)
    if path.is_symlink():
        raise UserError(f"{path}: a link, not deleted", exit_code=SAVE)
    read_manifest(path)
    doomed = _temporary("del", path)
    os.rename(path, doomed)
    crash_point(f"{path.name} del")
    fsync_folder(path.parent)
    crash_point(f"{path.name} fsync del")
    shutil.rmtree(doomed)  # does not follow links
    crash_point(f"{path.name} rmtree")


def remove_leftovers(parent: Path | str, *, locked: bool = False) -> int:
    """Delete what killed processes left in `parent` (.tmp-* and .del-* by our pattern); return how much.

    locked=False deletes those of dead processes of this machine. locked=True deletes all of them: the caller holds the lock
    of the output folder, so nobody else can be writing there.
    """
    count = 0
    for path in Path(parent).glob(".*"):
        match = TEMPORARY.fullmatch(path.name)
        if match is None or path.is_symlink():
            continue
        if locked or (match["host"] == HOST and not _is_running(int(match["pid"]))):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            count += 1
    return count


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


# ---- locks --------------------------------------------------------------------------------------------------------


def lock_folder(folder: Path | str) -> IO[bytes]:
    """Claim an output folder for this process: hold the returned file open, close it (or use `with`) to let go.

    The lock is the kernel's (flock on <folder>/.lock), so it ends with its process however that dies. Raises UserError
    where another process holds it, naming that process, and where the folder cannot be made or written.
    """
    folder = Path(folder)
    try:
        make_folder(folder)
        file = open(folder / ".lock", "a+b", buffering=0)
    except OSError as error:
        hint = "choose an output_dir that can be written"
        raise UserError(f"output_dir = {str(folder)!r}: {error.strerror}", hint=hint, exit_code=SAVE) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200).decode("utf-8", "replace").strip() or "another process"
        file.close()
        raise UserError(
            f"{folder} is in use by {holder}",
            hint="wait for that run, stop it, or choose another output_dir",
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            file.close()
            raise
        warnings.warn(
            f"{folder}: this file system has no locks; two runs there would not notice each other", stacklevel=2
        )
    with suppress(OSError):  # the lock holds without its holder's name, for which a full disk has no room
        file.truncate(0)
        file.write(f"process {os.getpid()} on {HOST}\n".encode())
    return file


@contextmanager
def scratch_folder(parent: Path | str, name: str) -> Iterator[Path]:
    """A new hidden folder, which is deleted when the block ends; by the next call where the process was killed."""
    remove_leftovers(parent)
    folder = _temporary("tmp", Path(parent) / name)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def hidden_file(folder: Path | str) -> Iterator[Path]:
    """An empty file with a new hidden name, which is in the folder as long as the block lasts."""
    path = _temporary("tmp", Path(folder) / "mark")
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def waiting_lock(folder: Path) -> Iterator[None]:
    """Wait for the lock of a folder, a hidden file beside it, and hold it, so that one of several ranks makes a folder that all
    need. The folder that both are in is made where absent. The kernel's lock, as in lock_folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".lock-{folder.name}"), "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        yield
