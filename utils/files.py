"""Files that are never half-written, and folders that two processes do not write to at once."""
import contextlib
import errno
import fcntl
import glob
import io
import json
import os
import shutil
import sys
import tempfile
import weakref
from pathlib import Path

from mdil.utils.errors import UserError

HELD = weakref.WeakSet()        # files of the locks of this process; a forked child would go on holding them
os.register_at_fork(after_in_child=lambda: [file.close() for file in HELD])


def write_atomically(path, write, previous=None):
    """Calls write(file) on a new binary file that takes the place of `path` once complete and on the disk.

    previous: where the file that was at `path` goes instead of vanishing. A link is
    followed, not replaced; what is no regular file, or standard output, is written to.
    UserError if the disk does not take it; `path` is then as it was.
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
    except (OSError, RuntimeError) as error:    # writers of torch report a full disk as RuntimeError
        raise UserError(f'{path} could not be written ({" ".join(str(error).split())[:150]}); the previous file '
                        'is kept') from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def standard_stream(path):
    """The descriptor of standard output or error if `path` is the same file, else None."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(number)):
                return number
    return None


def written_through(path):
    """Whether `path` is a device, a pipe or standard output, which nothing can take the place of."""
    return os.path.exists(path) and not os.path.isdir(path) and (
        not os.path.isfile(path) or standard_stream(path) is not None)


def write_through(path, write):
    """Calls write(file) on the device, pipe or standard stream at `path`; UserError if it takes nothing."""
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
    """Where this process writes what becomes `path`."""
    return path.with_name(f'.{path.name}.{os.getpid()}.tmp')


def keep_as(path, previous):
    """Gives the file at `path` the name `previous` too, so that at no moment there is none at `path`.

    File systems without hard links have it moved instead, and copied to another file system.
    """
    link = temporary_name(previous)
    try:
        os.link(path, link)
        os.replace(link, previous)
    except OSError:
        move(path, previous)
    finally:
        with contextlib.suppress(OSError):
            link.unlink()       # it stays where both names were the same file already


def move(path, target):
    """Moves a file, to another file system too; there is never half a file at `target`."""
    try:
        os.replace(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = temporary_name(target)
        shutil.copyfile(path, copy)
        os.replace(copy, target)


def sync_folder(folder):
    """Waits until the names in `folder` are on the disk, where the file system can be asked to."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def remove_leftovers(folder, names):
    """Removes what killed processes left half-written of the files `names` in `folder`, which nobody else writes."""
    for name in names:
        target = Path(os.path.realpath(folder / name))
        for path in target.parent.glob(f'.{glob.escape(target.name)}.*.tmp'):
            with contextlib.suppress(OSError):
                path.unlink()


def write_text(path, text):
    """Writes `text` in UTF-8, atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + '\n')


def same_file(one, other):
    """Whether two paths name one file that exists, through links too."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def check_writable(option, path, folder=False, inputs=()):
    """Makes the folder of the file (or, with `folder`, the folder) that an option names; UserError if it cannot be.

    inputs: files that are read, none of which the option may name.
    """
    place = Path(path) if folder else Path(os.path.realpath(path)).parent
    if not folder and Path(path).is_dir():
        raise UserError(f'{option} {path} is a folder, a file name is expected')
    if any(same_file(path, read) for read in inputs):
        raise UserError(f'{option} {path} is a file that is read; name another file to write')
    if not folder and written_through(path):
        if not os.access(path, os.W_OK):
            raise UserError(f'{option} {path} cannot be written to; name another place')
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f'{option} {path} cannot be written to: {error.strerror}; name another place') from None


def check_new(option, path, overwrite, inputs=()):
    """As `check_writable` of a file; UserError too if there is one already and not `overwrite`."""
    check_writable(option, path, inputs=inputs)
    if not overwrite and os.path.isfile(path) and os.path.getsize(path) and not written_through(path):
        raise UserError(f'{option} {path} exists; name another file, or replace it with --overwrite')


def check_results(option, path, entries, inputs=()):
    """As `check_writable` of a file; UserError too if one is there that is no JSON object with the `entries` of ours."""
    check_writable(option, path, inputs=inputs)
    if not os.path.isfile(path) or not os.path.getsize(path) or written_through(path):
        return
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not set(entries) <= found.keys():
        raise UserError(f'{option} {path} exists and holds something else; name another file')


@contextlib.contextmanager
def locked(path, busy=None):
    """Holds the lock file `path` for this process; a dead process holds nothing.

    Where another process holds it, this one waits and says so, or raises UserError(busy)
    if that is given. A second lock in this process is refused as well. Loader workers, which
    outlive a killed run by seconds, close the file they inherit and so do not hold it.
    """
    try:
        file = open(path, 'ab+', buffering=0)      # for reading too: a FIFO would wait for a reader
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror}); name another folder') from None
    HELD.add(file)
    with file:
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
        yield
