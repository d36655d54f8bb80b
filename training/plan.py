"""What a step of a sequence trains and freezes, derived from the method's row and the options.

`building.freeze` applies the plan with `MultiDomainNet.freeze`, which defines what frozen means for batch
norms and dropout.
"""
from dataclasses import dataclass, replace

from mdil.models import get_method


@dataclass(frozen=True)
class StepPlan:
    """What one step does.

    trained: indices of the domains whose branches train.
    frozen: indices of the other domains.
    from_previous: whether the step continues from the model of a previous one.
    shared_frozen: whether the shared weights are frozen.
    terms: the classes of its loss terms.
    """
    trained: tuple
    frozen: tuple
    from_previous: bool
    shared_frozen: bool
    terms: tuple = ()

    @property
    def needs_teacher(self):
        """Whether a term uses the frozen model of the previous step."""
        return any(term.needs_teacher for term in self.terms)

    @property
    def mixed(self):
        """Whether each batch has images of all trained domains, and not of one of them in turn."""
        return any(term.mixed for term in self.terms)

    @property
    def domains_per_batch(self):
        """How many domains share a batch."""
        return len(self.trained) if self.mixed else 1

    @property
    def turns(self):
        """How many batches it takes until every trained domain has had its turn."""
        return len(self.trained) // self.domains_per_batch


def plan_step(options):
    """The StepPlan of complete options; `--shared-lr 0` freezes the shared weights, as a method's row can."""
    row, count = get_method(options.method), len(options.domains)
    trained = tuple(row.trained(range(count)))
    from_previous = len(trained) < count
    plan = StepPlan(trained, tuple(index for index in range(count) if index not in trained), from_previous,
                    count > 1 and (row.shared == 'frozen' or options.shared_lr == 0))
    return replace(plan, terms=tuple(term for term in row.terms if term.applies(options, plan)))
