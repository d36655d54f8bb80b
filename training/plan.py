"""What a step of a sequence trains and freezes: decided here, from the method's row and the options.

`building.freeze` carries it out, with `MultiDomainNet.freeze`, which says what frozen means for batch norms and dropout.
"""
from dataclasses import dataclass, replace

from mdil.models import get_method


@dataclass(frozen=True)
class StepPlan:
    """What one step does.

    trained: indices of the domains whose branches train. frozen: of the others.
    from_previous: whether it goes on from the model of a previous step.
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
        """Whether the frozen model of the previous step is asked."""
        return any(term.needs_teacher for term in self.terms)


def plan_step(options):
    """The StepPlan of complete options; `--shared-lr 0` freezes shared weights as a row does."""
    row, count = get_method(options.method), len(options.domains)
    trained = tuple(row.trained(range(count)))
    from_previous = len(trained) < count
    plan = StepPlan(trained, tuple(index for index in range(count) if index not in trained), from_previous,
                    from_previous and (row.shared == 'frozen' or options.shared_lr == 0))
    return replace(plan, terms=tuple(term for term in row.terms if term.applies(options, plan)))
