"""Atomic file writes, and locks that keep two processes from writing to the same folder."""
import contextlib
import errno
import fcntl
import glob
import io
import json
import math
import os
import shutil
import sys
import tempfile
import weakref
from pathlib import Path

from mdil.utils.errors import UserError, brief

HELD = weakref.WeakSet()        # lock files of this process; a forked child closes them, or it would keep the locks
os.register_at_fork(after_in_child=lambda: [file.close() for file in HELD])


def write_atomically(path, write, previous=None):
    """Calls write(file) on a new binary file, which replaces `path` once it is complete and on disk.

    previous: path at which to keep the old file. A symbolic link is followed, not replaced;
    devices, pipes and standard output are written to directly. UserError if writing fails;
    `path` is then unchanged.
    """
    if written_through(path):
        write_through(path, write)
        return
    path = Path(os.path.realpath(path))
    temporary = temporary_name(path)
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.is_file():
            keep_as(path, previous)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:    # torch.save reports a full disk as RuntimeError
        kept = '; the previous file is kept' if os.path.isfile(path) else ''
        raise UserError(f'{path} could not be written ({brief(error)}){kept}') from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def standard_stream(path):
    """The descriptor of standard output or standard error if `path` is that file, else None."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(number)):
                return number
    return None


def written_through(path):
    """Whether `path` is a device, a pipe or a standard stream, which cannot be replaced, only written to."""
    return os.path.exists(path) and not os.path.isdir(path) and (
        not os.path.isfile(path) or standard_stream(path) is not None)


def write_through(path, write):
    """Calls write(file), then sends the result to the device, pipe or stream at `path`; UserError if that fails."""
    content, number = io.BytesIO(), standard_stream(path)
    write(content)
    try:
        if number is not None:
            print(end='', flush=True, file=sys.stdout if number == 1 else sys.stderr)
        with open(path, 'wb') if number is None else os.fdopen(os.dup(number), 'wb') as file:
            file.write(content.getbuffer())
    except OSError as error:
        raise UserError(f'{path} could not be written ({error.strerror})') from None


def temporary_name(path):
    """The temporary file that this process writes before renaming it to `path`."""
    return path.with_name(f'.{path.name}.{os.getpid()}.tmp')


def keep_as(path, previous):
    """Gives the file at `path` the second name `previous`, so that `path` exists at every moment.

    Without hard links the file is moved instead (copied, if `previous` is on another file system).
    """
    link = temporary_name(previous)
    try:
        os.link(path, link)
        os.replace(link, previous)
    except OSError:
        move(path, previous)
    finally:
        with contextlib.suppress(OSError):
            link.unlink()       # os.replace leaves it if both names were already the same file


def move(path, target):
    """Moves a file, even to another file system (it then stays at `path` too); `target` is never half-written."""
    try:
        os.replace(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = temporary_name(target)
        shutil.copyfile(path, copy)
        os.replace(copy, target)


def sync_folder(folder):
    """Waits until the directory entries of `folder` are on disk, if the file system supports that."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def remove_leftovers(folder, names):
    """Removes temporary files of `names` that killed processes left in `folder`; nothing else may write there now."""
    for name in names:
        target = Path(os.path.realpath(folder / name))
        for path in target.parent.glob(f'.{glob.escape(target.name)}.*.tmp'):
            with contextlib.suppress(OSError):
                path.unlink()


def write_text(path, text):
    """Writes `text` in UTF-8, atomically; bytes of file names that are not UTF-8 as escapes."""
    write_atomically(path, lambda file: file.write(text.encode(errors='backslashreplace')))


def without_nan(value):
    """The value with None in place of every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Writes `value` as indented JSON, atomically; NaN and infinities as null."""
    write_text(path, json.dumps(without_nan(value), indent=2) + '\n')


def read_object(path):
    """The object in a JSON file; {} if the file is missing or holds no object."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}


def same_file(one, other):
    """Whether two paths name the same existing file, links followed."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def check_writable(option, path, folder=False, inputs=()):
    """Makes the folder of the file (or, with `folder`, the folder) that an option names; UserError if not writable.

    inputs: files to be read, which the option must not name.
    """
    place = Path(path) if folder else Path(os.path.realpath(path)).parent
    if not folder and os.path.isdir(path):
        raise UserError(f'{option} {path} is a folder, a file name is expected')
    if any(same_file(path, read) for read in inputs):
        raise UserError(f'{option} {path} is a file that is read; name another file to write')
    if not folder and written_through(path):
        if not os.access(path, os.W_OK):
            raise UserError(f'{option} {path} cannot be written to; name another place')
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place), contextlib.suppress(FileNotFoundError):
            os.lstat(temporary_name(Path(os.path.realpath(path))))     # fails if the name is too long
    except OSError as error:
        raise UserError(f'{option} {path} cannot be written to: {error.strerror}; name another place') from None


@contextlib.contextmanager
def new_folder(option, path, leftovers=()):
    """The folder at `path`, which an option names. What it made is removed again if an error leaves nothing in it.

    leftovers: names of files that count as nothing.
    """
    made = []
    with contextlib.suppress(OSError):      # reported below
        for place in (*reversed(Path(path).parents), Path(path)):
            if not os.path.lexists(place):
                os.mkdir(place)         # fails if another run makes it first, which is then that run's
                made.insert(0, place)
    check_writable(option, path, folder=True)
    try:
        yield Path(path)
    except UserError:
        with contextlib.suppress(OSError):
            if made and set(os.listdir(path)) <= set(leftovers):
                for name in os.listdir(path):
                    os.unlink(Path(path) / name)
                for place in made:
                    place.rmdir()
        raise


def check_new(option, path, overwrite, inputs=()):
    """`check_writable` for a file; UserError also if a non-empty file exists, unless `overwrite`."""
    check_writable(option, path, inputs=inputs)
    if not overwrite and os.path.isfile(path) and os.path.getsize(path) and not written_through(path):
        raise UserError(f'{option} {path} exists; name another file, or replace it with --overwrite')


def check_results(option, path, entries, inputs=()):
    """`check_writable` for a file; UserError also if one exists that is not a JSON object with all of `entries`."""
    check_writable(option, path, inputs=inputs)
    if not os.path.isfile(path) or not os.path.getsize(path) or written_through(path):
        return
    if not set(entries) <= read_object(path).keys():
        raise UserError(f'{option} {path} exists and holds something else; name another file')


@contextlib.contextmanager
def locked(path, busy=None):
    """Holds a lock on the file `path` within the context, which gets whether it does; the lock ends with the process.

    While another process holds it, this one prints that it waits, or raises UserError(busy) if
    `busy` is given. On a file system without locks it prints a warning and goes on. A second lock in
    the same process counts as another's. Loader workers, which outlive a killed run by seconds, close
    the inherited file and so do not keep the lock.
    """
    try:
        file = open(path, 'ab+', buffering=0)      # also for reading: opening a FIFO to write only would block
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror}); name another folder') from None
    HELD.add(file)
    with file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if busy:
                raise UserError(busy) from None
            print(f'waiting for the process that holds {path}', file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(f'{path.parent} cannot be locked ({error.strerror}); make sure that no other run uses it',
                  file=sys.stderr)
            held = False
        yield held
