"""Standard streams that may fail: a closed pipe, a terminal that is gone, a full disk."""
import contextlib
import os
import sys


class Lenient:
    """A text stream whose write and flush never raise; the last failure is kept in `error`."""

    def __init__(self, stream):
        self.stream, self.error = stream, None

    def write(self, text):
        with self.kept():
            self.stream.write(text)
        return len(text)

    def flush(self):
        with self.kept():
            self.stream.flush()

    @contextlib.contextmanager
    def kept(self):
        """Stores an error of the stream in `error`."""
        try:
            yield
        except (OSError, ValueError) as error:      # ValueError: the stream is closed
            self.error = error

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def lenient_output():
    """Within this context printing never raises; yields standard output as a Lenient.

    Output to a stream that was already closed when the process began is discarded.
    """
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Lenient(stream or open(os.devnull, 'w')) for stream in kept)
    try:
        yield sys.stdout
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            drop_if_broken(stream)
        sys.stdout, sys.stderr = kept


def drop_if_broken(stream):
    """Discards what a broken Lenient still buffers; otherwise Python would complain about it at exit."""
    if stream.error is not None:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text):
    """Writes a line to standard error from a signal handler, where print is not safe."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), f'{text}\n'.encode())
