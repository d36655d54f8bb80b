"""Draws docs/figures/demo.png from the demo's results: PYTHONPATH=. python docs/figures/demo.py [runs/demo]

Two toy streets, of the first and of the second domain: input, truth, and the prediction after each step by
the method and by fine-tuning. The picture in the repository is of a demo with EPOCHS="14 5 4".
"""
import json
import sys
from pathlib import Path

from mdil.datasets import get_domain
from mdil.evaluation import pictures
from mdil.evaluation.evaluation import split_of
from mdil.models.checkpoint import load_network, read_checkpoint
from mdil.utils.parallel import Place, pick_device

METHODS = 'mdil', 'fine-tune'


def load(folder):
    """({method: network after each step}, validation sets of the domains) of a demo's folder."""
    results = {name: json.loads((folder / name / 'results.json').read_text()) for name in METHODS}
    networks = {name: [load_network(read_checkpoint(step['state'])) for step in result['steps']]
                for name, result in results.items()}
    protocol = results[METHODS[0]]['protocol']
    size = protocol['height'], protocol['width']
    return networks, [split_of(get_domain(name), folder / 'data', 'val', size, protocol['resolution'])
                      for name in results[METHODS[0]]['domains']]


def show(axis, pixels, classes, domain, title):
    """Shows an image, with the colours of its classes (H, W) over it unless they are None."""
    axis.imshow(pixels if classes is None else pictures.overlay(pixels, classes, domain.palette, 0.85))
    axis.set_title(title, fontsize=9)


def draw(axes, number, dataset, networks):
    """Fills two rows: input above truth, then a column for each step, a row for each method.

    Returns the indices of the classes in the pictures.
    """
    image, truth = dataset.load(pictures.richest(dataset))
    truth, domain = truth.long().clamp(max=dataset.domain.void), dataset.domain
    pixels = pictures.hwc(image, truth.shape)
    seen = set(truth.unique().tolist())
    show(axes[0, 0], pixels, None, domain, f'{domain.name}: input')
    show(axes[1, 0], pixels, truth, domain, 'truth')
    for row, (name, steps) in zip(axes, networks.items()):
        for step, (axis, network) in enumerate(zip(row[1:], steps), 1):
            if step <= number:
                axis.text(0.5, 0.5, 'not learnt yet', ha='center', va='center', fontsize=9)
                continue
            answer = pictures.predict(network, number, image, truth, Place(pick_device('cpu')))
            seen |= set(answer.unique().tolist())
            score = pictures.image_miou(truth, answer, domain)
            show(axis, pixels, answer, domain, f'{name}, after step {step}: mIoU {score:.0f}')
    return seen - {domain.void}


def main(folder='runs/demo'):
    networks, datasets = load(Path(folder))
    figure = pictures.new_figure(figsize=(12, 7.1))
    axes = figure.subplots(4, 4)
    for axis in axes.flat:
        axis.axis('off')
    seen = set().union(*(draw(axes[2 * number:2 * number + 2], number, datasets[number], networks)
                         for number in (0, 1)))
    # Both domains have the same classes.
    pictures.draw_legend(figure, datasets[0].domain, sorted(seen), loc='outside lower center', ncols=10, fontsize=8)
    pictures.save_figure(Path(__file__).with_name('demo.png'), figure, dpi=74)


if __name__ == '__main__':
    main(*sys.argv[1:])
