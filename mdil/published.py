"""The network under the published code's arguments and keys, for programs that were written for it."""
from mdil.models import build_model
from mdil.models.multi_domain import MultiDomainNet


class Net(MultiDomainNet):
    """The paper's network, with parallel adapters, for `nb_tasks` domains.

    num_classes: classes of each domain, void included; a list, or an int for one domain.
    cur_task: index of the domain whose branch `forward` uses by default.

    The state dict has the published keys, without `module.`. Raises ValueError for arguments that
    contradict each other.
    """

    def __init__(self, num_classes, nb_tasks=1, cur_task=0):
        counts = [num_classes] if isinstance(num_classes, int) else list(num_classes)
        if len(counts) != nb_tasks or not 0 <= cur_task < nb_tasks:
            raise ValueError(f'num_classes {counts}, nb_tasks {nb_tasks} and cur_task {cur_task} contradict one '
                             'another: num_classes has a number for each task, and cur_task is the index of one')
        built = build_model(counts)
        super().__init__(built.views[0], built.domain_bn)
        self.views, self.cur_task = built.views, cur_task

    def forward(self, images, task=None):
        """Logits (B, classes, H, W) of images (B, 3, H, W), floats in [0, 1]; task: index of the domain."""
        return super().forward(images, self.cur_task if task is None else task)
