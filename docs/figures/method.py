"""Draws docs/figures/method.png, the method in two panels: python docs/figures/method.py"""
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

SHARED, LINE = '#d9d9d9', '#404040'
DOMAINS = {'Cityscapes': '#8fb8de', 'BDD100K': '#f4b183', 'IDD': '#a9d18e'}
STEP = 0.55      # how far one domain's boxes lie below those of the one before


def box(axis, x, y, width, height, text, color, **keywords):
    """A rounded box around its centre (x, y)."""
    axis.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=color, edgecolor=LINE,
                                  boxstyle='round,pad=0.02,rounding_size=0.08', linewidth=0.9))
    axis.text(x, y, text, ha='center', va='center', **{'fontsize': 9, **keywords})


def arrow(axis, start, end, **keywords):
    """An arrow between two points."""
    axis.add_patch(FancyArrowPatch(start, end, **{'arrowstyle': '-|>', 'mutation_scale': 10, 'color': LINE,
                                                  'linewidth': 1, 'shrinkA': 0, 'shrinkB': 0, **keywords}))


def per_domain(axis, x, y, width, text):
    """A box for each domain, one below the other."""
    for number, color in enumerate(DOMAINS.values()):
        box(axis, x, y - STEP * (number - 1), width, 0.42, text, color)


def draw_block(axis):
    """One half of an encoder block: shared convolutions, an adapter and a batch norm of each domain."""
    axis.set_title('Half an encoder block: what a domain owns', loc='left', fontsize=11)
    axis.text(0.05, 4.1, 'input', fontsize=9, va='center')
    box(axis, 2.6, 4.1, 2.6, 0.62, '3x1 conv, ReLU, 1x3 conv', SHARED)
    per_domain(axis, 2.6, 2.4, 1.7, '1x1 adapter')
    axis.text(4.75, 4.1, '+', fontsize=13, ha='center', va='center',
              bbox={'boxstyle': 'circle,pad=0.12', 'facecolor': 'white', 'edgecolor': LINE})
    per_domain(axis, 6.15, 4.1, 1.6, 'batch norm')
    axis.text(7.6, 4.1, 'ReLU', fontsize=9, va='center')
    arrow(axis, (0.65, 4.1), (1.26, 4.1))
    arrow(axis, (0.95, 4.1), (1.7, 2.4), connectionstyle='angle,angleA=-90,angleB=180,rad=0')
    arrow(axis, (3.93, 4.1), (4.5, 4.1))
    arrow(axis, (3.5, 2.4), (4.75, 3.84), connectionstyle='angle,angleA=0,angleB=-90,rad=0')
    arrow(axis, (4.99, 4.1), (5.32, 4.1))
    arrow(axis, (6.98, 4.1), (7.5, 4.1))
    box(axis, 0.75, 0.85, 1.15, 0.42, 'shared', SHARED)
    for number, (name, color) in enumerate(DOMAINS.items()):
        box(axis, 2.35 + 1.75 * number, 0.85, 1.5, 0.42, name, color)
    axis.text(0.15, 0.18, 'An image of a domain passes through the grey boxes and those of its own colour.\n'
              'The batch norms of the downsamplers and the whole decoder are per domain, too.', fontsize=9, va='center')


def draw_step(axis):
    """Step 3: which parts of student and teacher train, and the loss."""
    axis.set_title('Step 3: IDD is learnt, without images of the others', loc='left', fontsize=11)
    box(axis, 0.7, 2.7, 1.2, 0.62, 'images\nof IDD', 'white')
    colors = list(DOMAINS.values())
    axis.text(2.0, 4.75, 'student', fontsize=9, style='italic')
    axis.text(2.0, 0.4, 'teacher: the frozen\nmodel of step 2', fontsize=9, style='italic', va='center')
    box(axis, 2.8, 4.1, 1.6, 0.62, 'shared\nrate 5e-6', SHARED)
    box(axis, 2.8, 1.3, 1.6, 0.62, 'shared', SHARED)
    branches = [('IDD: rate 5e-4', colors[2], 4.65, 4.1), ('BDD100K: frozen', colors[1], 4.1, 4.1),
                ('Cityscapes: frozen', colors[0], 3.55, 4.1), ('BDD100K', colors[1], 1.58, 1.3),
                ('Cityscapes', colors[0], 1.02, 1.3)]
    for name, color, y, shared in branches:
        box(axis, 4.85, y, 1.75, 0.42, name, color, fontsize=8)
        arrow(axis, (3.62, shared), (3.95, y))
    box(axis, 7.35, 5.15, 1.7, 0.42, 'labels of IDD', 'white', fontsize=8.5)
    box(axis, 7.35, 4.4, 1.7, 0.42, 'cross-entropy', '#fff2cc', fontsize=8.5)
    box(axis, 7.35, 2.7, 1.7, 0.62, '0.1 x distillation\nof both', '#fff2cc', fontsize=8.5)
    arrow(axis, (7.35, 4.92), (7.35, 4.63))
    arrow(axis, (5.75, 4.65), (6.47, 4.4))
    for y, end in ((4.1, 2.9), (3.55, 2.78), (1.58, 2.62), (1.02, 2.5)):
        arrow(axis, (5.75, y), (6.47, end))
    arrow(axis, (1.32, 2.85), (1.97, 4.0))
    arrow(axis, (1.32, 2.55), (1.97, 1.4))


def main():
    figure = Figure(figsize=(13, 4.6), layout='constrained')
    for axis, draw in zip(figure.subplots(1, 2), (draw_block, draw_step)):
        axis.set(xlim=(0, 8.4), ylim=(-0.1, 5.5), aspect='equal')
        axis.axis('off')
        draw(axis)
    figure.savefig(Path(__file__).with_name('method.png'), dpi=100, metadata={'Software': None}, bbox_inches='tight')


if __name__ == '__main__':
    main()
