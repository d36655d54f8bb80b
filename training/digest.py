"""Digests of the data that a run trains on, kept in its checkpoints to detect changes while it was stopped."""
import hashlib
import os
from pathlib import Path

from tqdm import tqdm

from mdil.datasets.judgement import content_digest
from mdil.utils.errors import UserError
from mdil.utils.workers import in_threads

# What is compared -> its name in messages.
KINDS = {'pairs': 'which images and labels there are', 'images': 'sizes of image files', 'labels': 'content of labels',
         'values': 'meaning of label values', 'classes': 'class names', 'weights': 'class weights'}


def data_digests(data):
    """{kind in KINDS: {domain and split: digest}} of a list of DomainData.

    File names count relative to the domain's folder, so the data may be moved; file times do not count.
    Labels are read in full; of images, only the size counts.
    """
    found = {kind: {} for kind in KINDS}
    for domain_data in data:
        found['classes'][domain_data.domain.name] = short_digest(domain_data.domain.classes)
        found['weights'][domain_data.domain.name] = short_digest(domain_data.class_weights.tolist())
        for loader in (domain_data.train, domain_data.val):
            if loader is not None:
                for kind, digest in split_digests(loader.dataset).items():
                    found[kind][f'{loader.dataset.domain.name} {loader.dataset.split}'] = digest
    return found


def split_digests(data):
    """{kind: digest} of a SegmentationDataset."""
    files = [path for pair in data.pairs for path in (pair.image, pair.label)]
    names = [os.fsencode(os.path.relpath(path, data.folder)) for path in files]
    bar = tqdm(data.pairs, desc=f'reading labels of {data.domain.name} {data.split}', unit='file', leave=False,
               disable=None)
    labels = list(in_threads(content_digest, (pair.label for pair in bar), min(8, os.cpu_count() or 1)))
    try:
        sizes = [os.path.getsize(pair.image) for pair in data.pairs]
    except OSError as error:
        raise UserError(f'{error.filename} cannot be read: {error.strerror}') from None
    kinds = {id(pair.values): (sorted(pair.values.items()), pair.by_color) for pair in data.pairs}
    return {'pairs': short_digest(names), 'images': short_digest(sizes), 'labels': short_digest(labels),
            'values': short_digest(sorted(kinds.values()))}


def start_digest(options):
    """A digest of the file, --state or --weights, that a step starts from; None without one."""
    path = options.state or options.weights
    return content_digest(Path(path)).hex() if path and os.path.isfile(path) else None


def short_digest(value):
    """32 hexadecimal digits that change with `value`."""
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


def are_digests(value):
    """Whether `value` has the form that `data_digests` returns."""
    return isinstance(value, dict) and all(
        isinstance(part, dict) and all(isinstance(digest, str) for digest in part.values()) for part in value.values())


def check_unchanged(saved, now, folder):
    """UserError if anything in both digests has changed since the run in `folder` stopped."""
    changed = [f'{words} ({", ".join(places)})' for kind, words in KINDS.items()
               if (places := [place for place, digest in now[kind].items()
                              if saved.get(kind, {}).get(place, digest) != digest])]
    if changed:
        raise UserError(f'--resume: the data of the run in {folder} changed since it stopped: {"; ".join(changed)}; '
                        'restore it, or start anew in another --savedir')
