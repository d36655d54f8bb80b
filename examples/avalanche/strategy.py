"""The paper's method as an Avalanche strategy; the README.md in this folder runs a sequence."""
import copy

import torch
import torch.nn.functional as F
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training.templates import SupervisedTemplate

import mdil
from mdil.datasets import SegmentationDataset, get_domain
from mdil.models import build_model


class Samples(SegmentationDataset):
    """A data set of (image (3, H, W), label (H, W)), both uint8."""
    __getitem__ = SegmentationDataset.load


def benchmark(names, root, size, streams=('train', 'val')):
    """A benchmark with an experience for each domain in each stream; size: (height, width) to resize images to."""
    return benchmark_from_datasets(**{stream: [AvalancheDataset([Samples(get_domain(name, {}), root, stream, size)])
                                               for name in names] for stream in streams})


class MDIL(SupervisedTemplate):
    """Learns experience i in branch i of one network.

    classes: number for each domain, including void, the last class. lr: of the experience's own branch, and of the
    shared weights in the first experience. shared_lr: of the shared weights in later ones; 0 freezes them, which is
    the method adapters-only. lambdac: weight of the distillation.
    """

    def __init__(self, *, classes, lr=5e-4, shared_lr=5e-6, lambdac=0.1, **options):
        self.classes, self.lr, self.shared_lr, self.lambdac, self.teacher = classes, lr, shared_lr, lambdac, None
        model = build_model(classes[:1])
        super().__init__(model=model, optimizer=torch.optim.Adam(model.parameters()), **options)

    def check_model_and_optimizer(self, **_):
        """Adds the experience's branch, freezes the older ones, and makes the optimiser."""
        new, model = self.experience.current_experience, self.model
        if new:
            self.teacher = copy.deepcopy(model).eval() if self.shared_lr else None
            model.add_domain(self.classes[new])
            model.freeze(range(new), shared=not self.shared_lr, dropout=bool(self.shared_lr)).train()
        groups = [{'params': model.branch_parameters(new), 'lr': self.lr},
                  {'params': model.shared_parameters(), 'lr': self.shared_lr if new else self.lr}]
        self.optimizer = torch.optim.Adam(groups, weight_decay=1e-4)

    def forward(self):
        """Logits of the experience's branch; None in training, where the loss runs the network itself."""
        return None if self.is_training else self.model(self.mb_x.float() / 255, self.experience.current_experience)

    def criterion(self):
        domain = self.experience.current_experience
        if self.is_training:
            return mdil.step_loss(self.model, domain, self.mb_x, self.mb_y, self.teacher, lambdac=self.lambdac)['loss']
        return F.cross_entropy(self.mb_output, self.mb_y.long(), ignore_index=self.classes[domain] - 1)
