"""Errors that a user can fix; they end the program with one line and exit status 2."""
import contextlib
import os
import sys
import traceback
from pathlib import Path

from mdil.utils.output import lenient_output

RESUME = '--resume continues from the last checkpoint'
NO_MEMORY = f'the memory of this machine is full; lower --num-workers, --batch-size or --height; {RESUME}'
NO_GPU_MEMORY = f'the GPU is out of memory; lower --batch-size or --height, or try --precision bf16; {RESUME}'
# Errors of other libraries, matched by type name or text -> what to do about them. The first match counts.
ADVICE = {'OutOfMemoryError': NO_GPU_MEMORY, 'CUDA error: out of memory': NO_GPU_MEMORY,
          'shared memory': 'the shared memory (/dev/shm) that loader processes use is too small; enlarge it (docker '
                           f'run --shm-size=8g), or use --num-workers 0; {RESUME}',
          'Too many open files': f'too many files are open; allow more (ulimit -n), or lower --num-workers; {RESUME}',
          'ancdata': f'too many files are open; allow more (ulimit -n), or lower --num-workers; {RESUME}',
          'allocate memory': NO_MEMORY, 'MemoryError': NO_MEMORY,
          'DataLoader worker': f'a loader process died (out of memory, or killed); lower --num-workers; {RESUME}',
          'gloo/transport': f'another process of this run has ended; see what it said; {RESUME}'}


# Packages that only some tools need: import name -> package to install.
OPTIONAL = {'matplotlib': 'matplotlib', 'sklearn': 'scikit-learn', 'visdom': 'visdom', 'av': 'av'}


def printable(text):
    """`text` on one line that any terminal can show; control characters and undecodable bytes are escaped."""
    return ''.join(sign if sign.isprintable() else sign.encode('unicode_escape').decode() for sign in text)


def brief(error, most=150):
    """What an error of another library says, on one line of at most `most` characters."""
    return ' '.join(str(error).split())[:most]


def counted(number, noun):
    """A number of things in words."""
    return f'{number} {noun}' if number == 1 else f'{number} {noun}s'


class UserError(Exception):
    """Says in one line what is wrong, where, and what to do."""

    def __init__(self, message):
        # A loader worker's error arrives with its traceback in front.
        super().__init__(printable(message.rsplit('UserError: ', 1)[-1].strip()))


def advice(error):
    """The line to print for an error of another library, or None if none is known."""
    handed_over = any(frame.f_code.co_name == '_try_get_data' for frame, _ in traceback.walk_tb(error.__traceback__))
    if handed_over and isinstance(error, (OSError, EOFError)):      # the worker died while handing over a batch
        return ADVICE['DataLoader worker']
    return next((line for key, line in ADVICE.items() if key in type(error).__name__ or key in str(error)), None)


def run_main(main):
    """Calls `main()` and turns errors that a user can fix into one line and exit status 2.

    A failure to print never stops `main()`. Output that could not be written is reported at
    the end as such an error, unless the reader of the pipe went away.
    """
    with lenient_output() as output:
        try:
            exit_by(main)
        except SystemExit as end:
            output.flush()
            lost = isinstance(output.error, OSError) and not isinstance(output.error, BrokenPipeError)
            if end.code or not lost:
                raise
            print(f'error: standard output could not be written ({output.error.strerror}); files are complete',
                  file=sys.stderr)
            sys.exit(2)


def exit_by(main):
    """Exits with the status of `main()`, or with one line and status 2 for an error that a user can fix."""
    try:
        sys.exit(main())
    except UserError as error:
        line = str(error)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        package = OPTIONAL.get((error.name or '').split('.')[0])
        if package is None:
            raise
        line = f'{package} is missing: pip install {package}'
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        line = advice(error)
        if line is None:
            raise
    if first_to_fail():
        print(f'error: {line}', file=sys.stderr)
    sys.exit(2)


def first_to_fail():
    """False if another process that torchrun started on this machine has failed before, and printed why."""
    report = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if report:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            try:        # in these processes' own folder, which torchrun removes
                (Path(report).parents[1] / 'failed').touch(exist_ok=False)
            except FileExistsError:
                return False
    return True
