"""How far the mIoU that predict.py --advise expects is from the true mIoU, on known and on left-out domains.

    python -m benchmarks.advise --states WITHOUT_IDD WITHOUT_CAMVID ALL --data-root DATA \\
        --domains cityscapes camvid idd-lite --out advise.json

Each checkpoint is tested on the validation images of every domain, learnt or not. Because label sets
differ, expected and true mIoU are those of the classes that all domains share (IDD level 1). The
branch is calibrated on every second image of its own validation set, starting with the first; the
tested images are every second one, starting with the second.
"""

from functools import reduce
from operator import add

import torch
from tqdm import tqdm

from mdil.datasets import SegmentationDataset, common, get_domain
from mdil.evaluation import metrics
from mdil.evaluation.advise import PART, WORTH, calibration, counts_of
from mdil.evaluation.evaluation import load_network_and_domains, logits_of
from mdil.evaluation.predictor import trained_size
from mdil.models.identify import identifier_of, looks_of
from mdil.training.records import environment
from mdil.utils.errors import run_main
from mdil.utils.files import check_new, write_json
from mdil.utils.parallel import session
from mdil.utils.parser import Parser, data_options, data_paths, machine_options

CLASSES = len(common.CLASSES)


def parse(argv=None):
    parser = Parser(prog='python -m benchmarks.advise', description='Expected against true mIoU.')
    parser.add_argument('--states', nargs='+', required=True, metavar='CKPT', help='checkpoints with statistics')
    parser.add_argument('--domains', nargs='+', required=True, metavar='NAME', help='domains to ask about')
    parser.add_argument('--out', required=True, metavar='FILE', help='JSON file to write')
    parser.add_argument('--overwrite', action='store_true', help='replace it')
    data_options(parser)
    machine_options(parser, workers=0)
    return parser.parse_args(argv)


@torch.inference_mode()
def parts_of(model, index, branch, domain, dataset, first, place):
    """[(Counts, confusion matrix)] in the common classes, for parts of PART images: every second one from `first` on.

    index, branch: the branch that segments; domain: that of the images.
    """
    parts, numbers = [], range(first, len(dataset), 2)
    to_truth = torch.tensor(common.to_common(domain))
    for start in tqdm(range(0, len(numbers), PART), desc=f'{branch.name} on {domain.name}', leave=False, disable=None):
        images, labels = map(torch.stack, zip(*(dataset.load(number) for number in numbers[start:start + PART])))
        counts, answers = counts_of(logits_of(model, index, images, place, 'fp32'), common.to_common(branch)[:-1],
                                    CLASSES)
        parts.append((counts, metrics.confusion(answers.cpu(), to_truth[labels.long()], CLASSES + 1)))
    return parts


def ask(state, options, place):
    """(names of the checkpoint's domains, {tested domain: expected and true mIoU, and more})."""
    asked = [get_domain(name, data_paths(options.data)) for name in options.domains]
    checkpoint, model, domains = load_network_and_domains(state, place, data_paths(options.data))
    identifier, found = identifier_of(checkpoint.content, domains, state), {}
    splits = {domain.name: SegmentationDataset(domain, options.data_root, 'val', trained_size(checkpoint.content))
              for domain in (*asked, *domains)}
    for domain in asked:
        guess = identifier.guess(looks_of([pair.image for pair in splits[domain.name].pairs[1::2]], options.num_workers,
                                          domain.name))
        index = int(torch.bincount(guess.domain, minlength=len(domains)).argmax())
        branch = domains[index]
        known = calibration(parts_of(model, index, branch, branch, splits[branch.name], 0, place))
        parts = parts_of(model, index, branch, domain, splits[domain.name], 1, place)
        expected, error = known.expected(reduce(add, (counts for counts, _ in parts)))
        unknown = guess.unknown.double().mean().item()
        found[domain.name] = {
            'learnt': domain.name in [other.name for other in domains], 'branch': branch.name, 'unknown': unknown,
            'worth': unknown > WORTH, 'expected_miou': expected, 'error': error, 'own_miou': known.miou,
            'true_miou': metrics.mean_iou(sum(matrix for _, matrix in parts))}
    return [domain.name for domain in domains], found


def main(argv=None):
    options = parse(argv)
    check_new('--out', options.out, options.overwrite, options.states)
    with session(options.device) as place:
        answers = [ask(state, options, place) for state in options.states]
        results = {'states': [{'knows': names, 'asked': found} for names, found in answers],
                   'versions': environment(place.device)}
    write_json(options.out, results)
    for names, found in answers:
        for name, entry in found.items():
            print(f'{"+".join(names)} asked about {name}: {entry["branch"]}, {100 * entry["unknown"]:.0f} % unknown, '
                  f'expected {entry["expected_miou"]:.1f} +- {entry["error"] or float("nan"):.1f}, '
                  f'true {entry["true_miou"]:.1f}')


if __name__ == '__main__':
    run_main(main)
