"""A method in one file, as docs/extending shows it: elastic weight consolidation.

    python -m tests.ewc train --method ewc --domains cityscapes BDD --state CS/model_best.pth.tar --lambdac 100 --savedir RUN
    python -m tests.ewc eval --state RUN/model_best.pth.tar
"""
import copy
import itertools

import torch
import torch.nn.functional as F

from mdil.__main__ import main
from mdil.losses.terms import CrossEntropy, LossTerm
from mdil.models.methods import METHODS, Method
from mdil.utils.precision import to_float


class EWC(LossTerm):
    """Half the squared distance of the shared weights to the previous model's, weighted by its Fisher information.

    Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017. The
    old images are gone: every old branch labels a few of the new ones itself.
    """
    name, needs_teacher = 'ewc', True

    def __init__(self, options):
        super().__init__(options)
        self.weight = options.lambdac

    def setup(self, run):
        previous, samples = copy.deepcopy(run.teacher).requires_grad_(True).eval(), run.trained[0].train.dataset
        weights, count = previous.shared_parameters(), min(16, len(samples))
        self.fisher = [torch.zeros_like(weight) for weight in weights]
        for index, branch in itertools.product(range(count), previous.views):
            logits = branch(to_float(samples.load(index)[0][None].to(run.place.device)))
            gradients = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), weights)
            for total, gradient in zip(self.fisher, gradients):
                total += gradient.square() / count

    def forward(self, step, images, labels, domain, part):
        moved = zip(self.fisher, step.student.shared_parameters(), step.teacher.shared_parameters())
        return sum((fisher * (new - old).square()).sum() for fisher, new, old in moved) / 2


ROW = Method('fine-tuning held by elastic weight consolidation', terms=(CrossEntropy, EWC),
             uses=('lambdac', 'shared_lr', 'no_dropout'))

if __name__ == '__main__':      # the tests import this module and must not add a method to the table for good
    METHODS['ewc'] = ROW
    main()
