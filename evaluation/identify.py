"""Adds to a checkpoint what `--domain auto` needs: statistics of how each domain's images look.

    python -m mdil identify published.pth.tar --domains cityscapes BDD --data-root DATA --out known.pth.tar
    python -m mdil identify old.pth.tar --images cityscapes=photos/aachen IDD=photos/hyderabad --out known.pth.tar

train.py stores them for every domain that it learns, so this is for older and published files.
They take a few kilobytes for each domain and contain no images.
"""
from pathlib import Path

from mdil.datasets import get_domain
from mdil.datasets.pairs import find_split
from mdil.datasets.segmentation import open_image
from mdil.evaluation.inputs import images_in, upright
from mdil.models import branches, checkpoint
from mdil.models.identify import FEWEST, statistics_of
from mdil.models.methods import nameless_options
from mdil.utils.errors import UserError, run_main
from mdil.utils.files import check_new
from mdil.utils.parser import Parser, data_options, data_paths, natural


def parse(argv=None):
    parser = Parser(prog='python -m mdil identify',
                    description='Adds to a checkpoint the image statistics that --domain auto needs.')
    parser.add_argument('state', metavar='CKPT', help='a checkpoint, published ones too')
    parser.add_argument('--out', required=True, metavar='FILE', help='the file to write')
    parser.add_argument('--overwrite', action='store_true', help='replace it if it exists')
    parser.add_argument('--images', nargs='+', default=[], metavar='NAME=FOLDER',
                        help='training images of a domain (default: those below --data-root)')
    nameless_options(parser)
    parser.add_argument('--num-workers', type=natural, default=2, help='threads that read images')
    data_options(parser)
    return parser.parse_args(argv)


def images_of(name, folders, options):
    """Paths of a domain's training images, in order; UserError if there are none."""
    if name in folders:
        return [source.path for source in images_in(folders[name])]
    domain = get_domain(name, data_paths(options.data))
    return [pair.image for pair in find_split(domain, options.data_root, 'train').pairs]


def folders_of(options, known):
    """{domain: Path} of --images; UserError for an item that is malformed or names a domain twice."""
    folders = {}
    for item in options.images:
        name, equals, folder = item.partition('=')
        if not (name and equals and folder):
            raise UserError(f'--images {item!r} is not NAME=FOLDER')
        name = known.names[known.index(name)]
        if name in folders:
            raise UserError(f'--images names {name} twice; its images must be in one folder')
        folders[name] = Path(folder)
    return folders


def with_statistics(options):
    """The checkpoint's content with statistics added for every domain that lacks them or is given in --images."""
    known = branches.LoadedCheckpoint(options.state, options.domains, options.method, data_paths(options.data))
    folders, content = folders_of(options, known), known.checkpoint.content
    found = dict(content.get('domain_statistics', {}))
    for name in known.names:
        if name in folders or name not in found:
            read = upright if name in folders else open_image       # training takes pairs as they are stored
            found[name] = statistics_of(images_of(name, folders, options), options.num_workers,
                                        f'image statistics of {name}', read)
            rare = f'; fewer than {FEWEST}: none will be called unknown' if found[name]['count'] < FEWEST else ''
            print(f'{name}: {found[name]["count"]} images{rare}')
    # A file of this code keeps its whole content, including the state that a run resumes from.
    return {**(content if 'version' in content else known.content()), 'domain_statistics': found}


def main(argv=None):
    options = parse(argv)
    check_new('--out', options.out, options.overwrite, [options.state])
    checkpoint.save(with_statistics(options), options.out)
    print(f'{options.out}: written')


if __name__ == '__main__':
    run_main(main)
