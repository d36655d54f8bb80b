"""Errors that a user can mend: one line, exit status 2."""
import sys


class UserError(Exception):
    """Says what is wrong, where, and what to do, in one line."""

    def __init__(self, message):
        # A loader worker's error arrives with its traceback in front.
        super().__init__(message.rsplit('UserError: ', 1)[-1].strip())


def run_main(main):
    """Calls `main()` and turns a UserError into one line and exit status 2."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
