"""The methods, one row each. Only training.paper, which translates the published scripts, asks for a method's name."""
from dataclasses import dataclass
from typing import Optional

from mdil.losses.terms import CrossEntropy, Distillation, MixedCrossEntropy
from mdil.models.multi_domain import MultiDomainNet, redraw
from mdil.models.networks import DEFAULT as ERFNET, build_network


@dataclass(frozen=True)
class Method:
    """One row of the table.

    adapter: the network's adapters, None, 'parallel' or 'series'.
    domain_bn: whether each domain has its own batch norms.
    shared: the rate of the shared weights where several domains share them, unless `--shared-lr` is given:
        'slow' (5e-6), 'full' (that of everything else), 'divided' (that, divided by the number of domains,
        as published) or 'frozen'.
    terms: the loss terms (classes of losses.terms), cross-entropy first.
    lr: learning rate after the first domain, of new branches and of shared weights that learn in full.
    dropout: whether the student uses dropout, in the layers that train, after the first domain.
    joint: whether all domains are learnt at once instead of one after another.
    one_domain: whether the network knows one domain only.
    uses: options of train.py that only some methods use and this one does; training.options refuses the
        others.
    """
    about: str
    adapter: Optional[str] = None
    domain_bn: bool = False
    shared: str = 'full'
    terms: tuple = (CrossEntropy,)
    lr: float = 5e-4
    dropout: bool = True
    joint: bool = False
    one_domain: bool = False
    uses: tuple = ()

    def __post_init__(self):
        others = ', '.join(term.__name__ for term in self.terms if not term.mixed)
        if self.mixed and others:
            raise ValueError(f'all terms of a method must be for mixed batches, or none; {others}: mixed is False')
        if self.mixed and not self.joint:
            raise ValueError('mixed batches need a joint method; joint is False')

    @property
    def mixed(self):
        """Whether each batch has images of all domains, and not of one domain in turn."""
        return any(term.mixed for term in self.terms)

    @property
    def plain(self):
        """Whether the encoder is that of a plain network: only the decoder belongs to a domain."""
        return self.adapter is None and not self.domain_bn

    def trained(self, domains):
        """Those of the list `domains` that a step trains: the last, which is new, or all of them."""
        return domains if self.joint else domains[-1:]


DISTILLED = CrossEntropy, Distillation
# Options of the terms DISTILLED, and of a row like the paper's.
DISTILLING = 'lambdac', 'temperature', 'distill_domains', 'distillation', 'teacher_mode', 'steps_per_batch', 'old_bn'
PAPER = *DISTILLING, 'shared_lr', 'new_decoder', 'new_statistics', 'no_dropout'
JOINT = 'rounds', 'shared_lr', 'no_dropout'

METHODS = {
    'mdil': Method('the paper\'s method, parallel adapters, batch norms and a decoder per domain, distillation',
                   adapter='parallel', domain_bn=True, shared='slow', terms=DISTILLED, uses=PAPER),
    'adapters-only': Method('as mdil, shared weights frozen after the first domain, learning rate 1e-3, no dropout',
                            adapter='parallel', domain_bn=True, shared='frozen', lr=1e-3, dropout=False,
                            uses=('new_decoder', 'new_statistics', 'no_dropout')),
    'fine-tune': Method('plain encoder learns on, new decoder, old decoders frozen',
                        uses=('shared_lr', 'new_decoder', 'no_dropout')),
    'feature-extraction': Method('plain encoder frozen after the first domain, new decoder', shared='frozen',
                                 uses=('frozen_encoder', 'new_decoder')),
    'lwf': Method('plain encoder learns on, held by distillation of the old decoders\' outputs',
                  terms=DISTILLED, uses=(*DISTILLING, 'shared_lr', 'new_decoder', 'no_dropout')),
    'series-adapters': Method('ablation: as mdil, adapters after the convolutions',
                              adapter='series', domain_bn=True, shared='slow', terms=DISTILLED, uses=PAPER),
    'domain-bn': Method('ablation: as mdil without adapters', domain_bn=True, shared='slow', terms=DISTILLED,
                        uses=PAPER),
    'adapters-shared-bn': Method('ablation: as mdil, batch norms shared by all domains', adapter='parallel',
                                 shared='slow', terms=DISTILLED,
                                 uses=(*DISTILLING, 'shared_lr', 'new_decoder', 'no_dropout')),
    'multi-task': Method('plain encoder, a decoder per domain, all data at once', joint=True, shared='divided',
                         uses=JOINT),
    'multi-task-domain-bn': Method('multi-task with batch norms per domain, as its batches are of one domain each',
                                   domain_bn=True, joint=True, shared='divided', uses=JOINT),
    'multi-task-mixed': Method('multi-task with images of all domains in every batch', joint=True,
                               terms=(MixedCrossEntropy,), uses=JOINT),
    'multi-task-adapters': Method("multi-task with the paper's network: adapters, batch norms and a decoder per domain",
                                  adapter='parallel', domain_bn=True, joint=True, shared='divided', uses=JOINT),
    'single-task': Method('a plain network for one domain', one_domain=True, uses=('no_dropout',)),
    'single-task-adapters': Method("the paper's network for one domain: what the method gains without any other domain",
                                   adapter='parallel', domain_bn=True, one_domain=True, uses=('no_dropout',)),
}
DEFAULT, ALIASES = 'mdil', {'ours': 'mdil'}        # aliases: names in the published code and earlier files


def method_name(name):
    """The name in METHODS for an alias; other names, and None, stay as they are."""
    return ALIASES.get(name, name)


def nameless_options(parser, files=''):
    """Adds `--domains` and `--method`, for files that do not state them; files: ' of ...', in the help."""
    parser.add_argument('--domains', nargs='+', default=[], metavar='NAME',
                        help=f'domains{files}, in order (published files do not name them)')
    parser.add_argument('--method', type=method_name, choices=tuple(METHODS),
                        help='method of a published file whose keys fit several')


def get_method(name):
    """The row of METHODS called `name`, which may be an alias; KeyError lists the choices."""
    name = method_name(name)
    if name not in METHODS:
        raise KeyError(f'unknown method {name!r}; choose from {", ".join(METHODS)}')
    return METHODS[name]


def unused(method):
    """Options of train.py that some methods use and `method` does not."""
    return [name for name in dict.fromkeys(name for row in METHODS.values() for name in row.uses)
            if name not in get_method(method).uses]


def build_model(num_classes, method=DEFAULT, network=ERFNET):
    """The network of `method` with random weights, for domains of `num_classes` classes each, void included.

    network: a name in `models.networks`. UserError if there is none, or if it cannot have the batch norms
        or adapters that the method needs.

    `build_model([20, 20])(images, domain=1)` returns logits (B, 20, H, W) of images (B, 3, H, W), floats in
    [0, 1].
    """
    row = get_method(method)
    if not num_classes:
        raise ValueError('num_classes is empty; a network needs at least one domain')
    model = MultiDomainNet(build_network(network, num_classes[0], row.adapter, row.domain_bn), row.domain_bn)
    for count in num_classes[1:]:
        redraw(model.branch(model.add_domain(count)))
    return model
