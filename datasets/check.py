"""Checks that domains are fit to train on: pairs, files, sizes, label values, class counts.

    python -m mdil check --domains cityscapes BDD IDD --data-root data
    python -m mdil check --domains cityscapes BDD IDD --data-root data --pairs-only

Every file of every pair is decoded. Images and labels without a partner are warnings (BDD100K's archives
hold six of each) and left out of training; anything else is an error. Notes point out classes that occur
in no training image, a large share of void, and images of one split that are copies of another split's.
The same file in two splits is an error. The last line counts the notes. The exit status is 0 without
errors, else 2. --pairs-only looks for pairs and reads none of them; files of one name with several endings
are warnings then.
"""
import os
import struct
import textwrap
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np

from mdil.datasets.domains import get_domain
from mdil.datasets.judgement import copied_files, judge, shared_files
from mdil.datasets.pairs import find_split
from mdil.datasets.segmentation import CHECK_HINT, open_image, open_label, to_classes
from mdil.utils.errors import UserError, counted, printable, run_main
from mdil.utils.files import check_results, write_json
from mdil.utils.parser import Parser, data_options, data_paths, natural
from mdil.utils.workers import in_parallel

PNG_START = b'\x89PNG\r\n\x1a\n'
LISTED = 20     # files printed of each kind; --json has all


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file: its kind, the file or folder, and what was found."""
    kind: str
    file: str
    message: str


@dataclass
class Report:
    """What a split of a domain holds.

    errors, warnings: Problems.
    pixels, images: (C,), pixels of each class and images that contain it, void last.
    remarks: sentences about what was counted.
    files: the images of the pairs.
    """
    domain: str
    split: str
    classes: tuple
    pairs: int
    errors: list
    warnings: list
    pixels: np.ndarray
    images: np.ndarray
    remarks: list = field(default_factory=list)
    files: list = field(default_factory=list)


def attempt(problems, kind, file, function, *arguments):
    """function(*arguments); on a UserError, adds a Problem with its message and returns None."""
    try:
        return function(*arguments)
    except UserError as error:
        problems.append(Problem(kind, str(file), str(error).removesuffix(CHECK_HINT)))
        return None


def whole_png(content):
    """Whether bytes are a PNG file with all its chunks, including the last, and all match their checksums."""
    place = len(PNG_START)
    if not content.startswith(PNG_START):
        return False
    view, kind = memoryview(content), b''
    while kind != b'IEND':
        if place + 12 > len(content):
            return False
        length, kind = struct.unpack_from('>I4s', content, place)
        end = place + 8 + length
        if end + 4 > len(content) or zlib.crc32(view[place + 4:end]) != struct.unpack_from('>I', content, end)[0]:
            return False
        place = end + 4
    return True


def check_end(path):
    """UserError if a PNG file is cut short, or damaged in a way that Pillow decodes all the same."""
    content = path.read_bytes()
    if content.startswith(PNG_START) and not whole_png(content):
        raise UserError(f'{path} cannot be read: a part is missing or does not match its checksum')


def inspect_pair(pair, num_classes):
    """(Problems of `pair`, pixels of each class, int64 (num_classes,), or None if the label is bad)."""
    problems = []
    image = attempt(problems, 'unreadable image', pair.image, open_image, pair.image)
    label = attempt(problems, 'unreadable label', pair.label, open_label, pair)
    for opened, kind, path in ((image, 'unreadable image', pair.image), (label, 'unreadable label', pair.label)):
        if opened:
            attempt(problems, kind, path, check_end, path)
    if image and label and image.size != label.size:
        problems.append(Problem('unequal sizes', str(pair.label), '{} is {}x{}, its label {} is {}x{}'.format(
            pair.image, *image.size, pair.label, *label.size)))
    if not label:
        return problems, None
    classes = attempt(problems, 'label values', pair.label, to_classes, np.asarray(label), pair)
    return problems, None if classes is None else np.bincount(classes.ravel(), minlength=num_classes)


def unpaired(found):
    """Problems, to be used as warnings, for the files of Split `found` that have no partner."""
    return [Problem(kind, str(path), f'{path} is left out')
            for kind, paths in (('image without a label', found.without_label),
                                ('label without an image', found.without_image)) for path in paths]


def check_split(domain, root, split, workers, pairs_only=False):
    """The Report of `domain`'s `split` under `root`; pairs_only: without reading files."""
    nothing = np.zeros(domain.num_classes, dtype=np.int64)
    report = Report(domain.name, split, (*domain.classes, 'void'), 0, [], [], nothing.copy(), nothing.copy())
    found = attempt(report.errors, 'no pairs', domain.folder, find_split, domain, root, split)
    if found is None:
        return report
    report.pairs, report.warnings = len(found.pairs), unpaired(found)
    problems = report.warnings if pairs_only else report.errors      # training takes the first
    for kind, groups in (('repeated image', found.repeated_images), ('repeated label', found.repeated_labels)):
        problems += [Problem(kind, str(first), f'{first} and {", ".join(map(str, others))} have the same name')
                     for first, *others in groups]
    if pairs_only:
        return report
    inspect = partial(inspect_pair, num_classes=domain.num_classes)
    for problems, counts in in_parallel(inspect, found.pairs, workers, f'{domain.name} {split}'):
        report.errors += problems
        if counts is not None:
            report.pixels += counts
            report.images += counts > 0
    wrong = {problem.file for problem in report.errors}
    report.files = [pair.image for pair in found.pairs if str(pair.image) not in wrong]
    if not report.pixels.any():     # no file could be counted
        return report
    faults, report.remarks = judge(domain, split, report.pixels.tolist())
    report.errors += [Problem('label values', domain.folder, fault) for fault in faults]
    return report


def compare_splits(reports):
    """Adds to each of a domain's reports what its images have in common with those of earlier splits."""
    for number, report in enumerate(reports):
        for other in reports[:number]:
            compare_files(other, report)


def compare_files(other, report):
    """Adds to `report` which of its images are also images of `other`, or copies of them."""
    same = set(shared_files(other.files, report.files))
    if len(same) == len(report.files) > 0:
        report.errors.append(Problem(
            'shared file', str(report.files[0]), f'all {len(same)} images of {report.split} are those of '
            f'{other.split}; lists can divide a folder (docs/data.md, One folder of images)'))
        return
    copies = copied_files(other.files, report.files)
    report.errors += [Problem('shared file', str(path), f'{path} of {report.split} is {known} of {other.split}')
                      for path, known in copies if path in same]
    copies = [(path, known) for path, known in copies if path not in same]
    if copies:
        report.remarks.append(f'{len(copies)} images of {report.split} are copies of images of {other.split}, '
                              f'e.g. {copies[0][0].name} of {copies[0][1].name}')


def class_table(report):
    """Lines of at most 80 columns: class, pixels, percent of pixels, images it appears in."""
    total = max(1, report.pixels.sum())
    rows = [f'{name[:38]:<38} {pixels:>18,} {100 * pixels / total:>9.4f} {images:>9,}'
            for name, pixels, images in zip(report.classes, report.pixels, report.images)]
    return [f'{"class":<38} {"pixels":>18} {"percent":>9} {"images":>9}', *rows]


def problem_lines(title, problems):
    """Lines that count `problems` by kind and list the first ones of each."""
    lines = []
    for kind, count in Counter(problem.kind for problem in problems).items():
        messages = [problem.message for problem in problems if problem.kind == kind]
        lines += [f'{title}: {kind}: {count}', *(f'  {message}' for message in messages[:LISTED])]
        if count > LISTED:
            lines.append(f'  and {count - LISTED} more; --json FILE lists all')
    return lines


def print_report(report):
    """Prints a Report: counts, problems and the table of classes."""
    print(f'{report.domain} {report.split}: {counted(report.pairs, "pair")}, {counted(len(report.errors), "error")}, '
          f'{counted(len(report.warnings), "warning")}')
    lines = problem_lines('error', report.errors) + problem_lines('warning', report.warnings)
    for remark in report.remarks:
        lines += textwrap.wrap(f'note: {printable(remark)}', 80, subsequent_indent='  ', break_on_hyphens=False,
                               break_long_words=False)
    print(*map(printable, lines), *(class_table(report) if report.files else ()), '', sep='\n')


def as_json(reports):
    """The reports as built-in types: {'fit': bool, 'domains': {name: {split: {...}}}}."""
    domains = {}
    for report in reports:
        total = max(1, int(report.pixels.sum()))
        classes = {name: {'pixels': int(pixels), 'percent': 100 * int(pixels) / total, 'images': int(images)}
                   for name, pixels, images in zip(report.classes, report.pixels, report.images)}
        domains.setdefault(report.domain, {})[report.split] = {
            'pairs': report.pairs, 'classes': classes,
            'errors': [asdict(problem) for problem in report.errors],
            'warnings': [asdict(problem) for problem in report.warnings], 'remarks': report.remarks}
    return {'fit': not any(report.errors for report in reports), 'domains': domains}


def check_parser():
    """The parser of this command."""
    parser = Parser(prog='python -m mdil check', description='Checks that domains are fit to train on.')
    parser.add_argument('--domains', nargs='+', required=True, metavar='NAME', help='domains to check')
    data_options(parser)
    parser.add_argument('--splits', nargs='+', default=['train', 'val'], metavar='SPLIT', help='splits to check')
    parser.add_argument('--pairs-only', action='store_true', help='look for pairs of files, but read none of them')
    parser.add_argument('--json', metavar='FILE', help='write everything found')
    parser.add_argument('--num-workers', '--workers', type=natural, default=os.cpu_count() or 1, help='processes')
    return parser


def main(arguments=None):
    """Checks what the command line names; returns 0 if it is fit to train on, else UserError."""
    options = check_parser().parse_args(arguments)
    paths = data_paths(options.data)
    if options.json and options.pairs_only:
        raise UserError('--pairs-only counts nothing that --json could hold; leave out one of them')
    if options.json:
        check_results('--json', options.json, ('fit', 'domains'))
    domains = {domain.name: domain for domain in (get_domain(name, paths) for name in options.domains)}
    if len(domains) < len(options.domains):
        raise UserError(f'--domains {" ".join(options.domains)} names a domain twice')
    reports = []
    for domain in domains.values():
        found = [check_split(domain, options.data_root, split, options.num_workers, options.pairs_only)
                 for split in dict.fromkeys(options.splits)]
        compare_splits(found)
        for report in found:
            print_report(report)
        reports += found
    if options.json:
        write_json(options.json, as_json(reports))
    wrong = [f'{report.domain} {report.split} ({len(report.errors)})' for report in reports if report.errors]
    if wrong:
        raise UserError(f'not fit to train on, errors in {", ".join(wrong)}; fix what is listed above')
    notes = sum(len(report.remarks) for report in reports)
    print('every domain has pairs; no file was read' if options.pairs_only else
          'fit to train on' + (f' ({counted(notes, "note")} above)' if notes else ''))
    return 0


if __name__ == '__main__':
    run_main(main)
