"""What the command lines share: the parser, argument types, and options for data, size and machine."""
import argparse
import difflib
import os
import re
import sys
from numbers import Integral
from pathlib import Path

from mdil.utils.errors import UserError
from mdil.utils.parallel import check_alone
from mdil.utils.precision import PRECISIONS

SIDE, LONGEST = 8, 2 ** 16      # image sides are multiples of SIDE, up to LONGEST
PUBLISHED_SIZE = 512, 1024      # height, width at which the published code trains


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default to the help of an option, unless it is trivial or the help already mentions it."""

    def _get_help_string(self, action):
        value = action.default
        if 'default' in action.help or value is False or value in (None, '', [], argparse.SUPPRESS):
            return action.help
        shown = ' '.join(map(str, value)) if isinstance(value, list) else '%(default)s'
        return f'{action.help} (default: {shown})'


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, a UserError without the usage text.

    refused: {option: reason} for options that do not exist but that users may expect; the
    error about such an option gives the reason. several: whether the tool shares its work among
    the processes of torchrun; for any other tool, parsing in one of several processes is an error.
    """

    def __init__(self, refused=None, several=False, **keywords):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **keywords)
        self.refused, self.several = refused or {}, several

    def parse_known_args(self, args=None, namespace=None):
        args = [home_in(text) for text in (sys.argv[1:] if args is None else args)]
        self.check_empty(args)
        parsed = super().parse_known_args(args, namespace)
        if not self.several:
            check_alone(self.prog)
        return parsed

    def check_empty(self, args):
        """Refuses an empty argument: it would count as not given, and hours later a result would be missing."""
        for before, text in zip([self.prog, *args], args):
            if not text or re.fullmatch(r'--[\w-]+=', text):
                self.error(f'the value after {text or before} is empty, perhaps a variable that is not set; '
                           'give one, or leave the option out')

    def error(self, message):
        reasons = '; '.join(f'{option}: {reason}' for option, reason in self.refused.items()
                            if f' {option} ' in f'{message} '.replace('=', ' '))
        raise UserError(f'{message} ({reasons or self.similar(message) or "--help lists the options"})')

    def similar(self, message):
        """The option that an unknown one was perhaps meant to be, as a question; '' if there is none."""
        unknown = re.findall(r'--[\w-]+', message) if message.startswith('unrecognized') else []
        near = [name for word in unknown
                for name in difflib.get_close_matches(word, self._option_string_actions, 1, 0.8)]
        return f'did you mean {near[0]}?' if near else ''


def home_in(text):
    """The argument with `~` replaced by the home folder; shells do not expand it after `--option=`."""
    return re.sub(r'(^|=)(~[\w.-]*)(?=/|$)', lambda found: found[1] + os.path.expanduser(found[2]), text)


def flag(name):
    """The option whose value argparse keeps as `name`."""
    return f'--{name.replace("_", "-")}'


def show(value):
    """The value of an option as text."""
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)


def whole(text):
    """argparse type: an int."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number') from None


def positive(text, least=1):
    """argparse type: an int from `least` to 2^31 - 1."""
    value = whole(text)
    if not least <= value < 2 ** 31:
        raise argparse.ArgumentTypeError(f'{text} is not at least {least}' if value < least else f'{text} is too large')
    return value


def natural(text):
    """argparse type: an int from 0 to 2^31 - 1."""
    return positive(text, least=0)


def seed_number(text):
    """argparse type: an int from 0 to 2^63 - 1, which every random generator accepts."""
    value = whole(text)
    if not 0 <= value < 2 ** 63:
        raise argparse.ArgumentTypeError(f'{text} is not between 0 and 2^63 - 1')
    return value


def rate(text):
    """argparse type: a finite float >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = float('nan')
    if not 0 <= value < float('inf'):
        raise argparse.ArgumentTypeError(f'{text} is not a finite number >= 0')
    return value


def is_side(value):
    """Whether `value` can be the side of an image: a multiple of SIDE from SIDE to LONGEST."""
    return isinstance(value, Integral) and SIDE <= value <= LONGEST and value % SIDE == 0


def side(text):
    """argparse type: an image side, see `is_side`."""
    value = whole(text)
    if value < SIDE or value % SIDE:
        near = max(SIDE, round(value / SIDE) * SIDE)
        raise argparse.ArgumentTypeError(f'{text} is not a positive multiple of {SIDE}; the nearest is {near}')
    if value > LONGEST:
        raise argparse.ArgumentTypeError(f'{text} is more than {LONGEST}')
    return value


def data_options(parser):
    """Adds `--data-root` and `--data`, which say where the data sets are."""
    group = parser.add_argument_group('data')
    group.add_argument('--data-root', '--datadir', default='data', metavar='DIR',
                       help='folder that holds the data sets')
    paths_option(group)
    return group


def paths_option(parser):
    """Adds `--data`, for `data_paths`."""
    parser.add_argument('--data', action='append', default=[], metavar='NAME=PATH',
                        help='path of a data set, or of your own domain (folder with domain.json); repeatable')


def data_paths(items):
    """{domain name: Path} of `--data NAME=PATH` items; UserError if one is malformed or two conflict."""
    paths = {}
    for item in items:
        name, equals, path = item.partition('=')
        if not (name and equals and path):
            raise UserError(f'--data {item!r} is not NAME=PATH, such as mytown=/data/mytown')
        if paths.setdefault(name, Path(path)) != Path(path):
            raise UserError(f'--data gives two paths for {name}, {paths[name]} and {path}; give one')
    return paths


def size_options(group, height=PUBLISHED_SIZE[0], otherwise='the training size'):
    """Adds the size that images are resized to; height: the default, or None for what `otherwise` says."""
    group.add_argument('--height', type=side, default=height,
                       help='image height, a multiple of 8' + ('' if height else f' (default: {otherwise})'))
    group.add_argument('--width', type=side, default=argparse.SUPPRESS,
                       help='image width, a multiple of 8 (default: twice the height)')


def complete_size(options):
    """Sets the width to twice the height unless given, or to None without a height; UserError for a width alone."""
    if options.height is None:
        if getattr(options, 'width', None):
            raise UserError('--width is given without --height')
        options.width = None
        return
    options.width = getattr(options, 'width', 2 * options.height)


def machine_options(parser, workers=2, precision='fp32', work='loader processes'):
    """Adds `--device`, `--precision` and `--num-workers`, with their defaults; work: what the workers are."""
    group = parser.add_argument_group('machine')
    group.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:N, or another torch device, such as mps')
    group.add_argument('--precision', choices=tuple(PRECISIONS), default=precision,
                       help='autocast type' + ('' if precision else ' (default: fp32)'))
    group.add_argument('--num-workers', type=natural, default=workers, help=work)
    return group
