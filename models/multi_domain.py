"""A network for several domains: one view for each. The shared modules are the same objects in all views.

A view is a plain network of one domain, `model.single(domain)`. Its head, its adapters and (with
`domain_bn`) its batch norms and dropout belong to that domain alone; every other module is the same object
in all views. `divide` alone decides which is which.

A network can take part if it offers
    forward(images)     logits (B, classes, H, W) of images (B, 3, H, W)
    heads               names of the modules that each domain has for itself, whatever the method
    output_layers       names of the convolutions whose output channels are the classes
and marks its adapters, if it has any, with `per_domain = True` (see `models.adapters`). `models.networks`
declares those that train.py knows.
"""
import copy
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mdil.models.layouts import file_key

OLD_BN = ('frozen', 'batch', 'released')


def divide(network, domain_bn):
    """({name: module} that a domain has for itself, {name: module} that all share), in the network's order.

    Only outermost modules are listed: none is inside another. With `domain_bn`, modules that act
    differently in training, batch norms and dropout, belong to each domain. ValueError if a module that
    contains a domain's modules also holds tensors of its own: these could not be shared.
    """
    kinds = (_BatchNorm, _DropoutNd) if domain_bn else ()
    own, containers = {}, {''}
    for name, module in network.named_modules():
        ancestors = [name[:place] for place, letter in enumerate(name) if letter == '.']
        if own.keys() & set(ancestors):
            continue
        if name in network.heads or getattr(module, 'per_domain', False) or isinstance(module, kinds):
            own[name] = module
            containers.update(ancestors)
    shared = {name: module for name, module in network.named_modules()
              if name not in containers and name not in own and name.rpartition('.')[0] in containers}
    for name in sorted(containers):
        module = network.get_submodule(name)
        for tensor, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            raise ValueError(f'{tensor} lies directly in {name or "the network"}, among modules of a domain; '
                             'put it into a module of its own')
    return own, shared


def outside_heads(network):
    """[(name, module)] of the modules outside the heads of a plain network."""
    return [(name, module) for name, module in network.named_modules()
            if not any(f'{name}.'.startswith(f'{head}.') for head in network.heads)]


class MultiDomainNet(nn.Module):
    """The views of one network for all domains; starts with one domain, `network` itself.

    domain_bn: whether each domain has batch norms of its own.
    """

    def __init__(self, network, domain_bn=True):
        super().__init__()
        self.domain_bn = domain_bn
        self.views = nn.ModuleList([network])
        self.frozen_modules = ()        # stay in eval mode while the rest trains
        divide(network, domain_bn)      # refuses a network that cannot take part

    def forward(self, images, domain=0):
        """Logits (B, classes of `domain`, H, W) of images (B, 3, H, W), floats in [0, 1].

        Raises IndexError for a domain that the network lacks.
        """
        return self.single(domain)(images)

    def single(self, domain):
        """The view of `domain`: a plain network, called with images alone. IndexError if there is none."""
        if not 0 <= domain < len(self.views):
            raise IndexError(f'domain {domain} asked of a network that knows {len(self.views)}')
        return self.views[domain]

    def mixed(self):
        """A view of all n domains, for batches of B/n images of each, in the order of the domains.

        It returns logits (B, most classes of any domain, H, W), 0 beyond the classes of an image's domain.
        Its modules are those of the other views; a domain's own see its part of the batch alone. RuntimeError
        if n does not divide B.
        """
        owns = [divide(view, self.domain_bn)[0] for view in self.views]
        # deepcopy takes what is in the memo as already copied.
        memo = {id(module): module for module in self.shared()}
        memo.update((id(module), PartByPart([own[name] for own in owns])) for name, module in owns[0].items())
        return copy.deepcopy(self.views[0], memo)

    @property
    def num_classes(self):
        """Classes of each domain, void included."""
        return [view.get_submodule(view.output_layers[0]).out_channels for view in self.views]

    def branch(self, domain):
        """The modules that belong to `domain` alone."""
        return list(divide(self.single(domain), self.domain_bn)[0].values())

    def branch_parameters(self, domain):
        """The parameters that belong to `domain` alone."""
        return [parameter for module in self.branch(domain) for parameter in module.parameters()]

    def shared(self):
        """The modules that all domains use."""
        return list(divide(self.views[0], self.domain_bn)[1].values())

    def shared_parameters(self):
        """The parameters that all domains use."""
        return [parameter for module in self.shared() for parameter in module.parameters()]

    def add_domain(self, num_classes, statistics='copied', head='copied', source=-1):
        """Appends a domain whose branch copies that of `source`, with fresh output layers; returns its index.

        statistics: 'copied', or 'fresh' to reset the running statistics of the new branch, except its
            head's, to mean 0 and variance 1.
        head: 'copied', or 'fresh' to initialise all of the new head at random.
        """
        # deepcopy takes what is in the memo as already copied, so shared modules stay shared.
        view = copy.deepcopy(self.views[source], {id(module): module for module in self.shared()})
        for name in view.output_layers:
            parent, _, child = name.rpartition('.')
            setattr(view.get_submodule(parent), child, output_layer_like(view.get_submodule(name), num_classes))
        self.views.append(view)
        if head == 'fresh':
            redraw(view.get_submodule(name) for name in view.heads)
        if statistics == 'fresh':
            for module in self.branch(len(self.views) - 1):
                if isinstance(module, _BatchNorm):
                    module.reset_running_stats()
        return len(self.views) - 1

    def remove_domain(self, domain):
        """Drops the branch of `domain`; the domains after it move up by one."""
        self.single(domain)     # IndexError if there is none
        self.views = nn.ModuleList([view for number, view in enumerate(self.views) if number != domain])

    def freeze(self, domains=(), shared=False, old_bn='frozen', dropout=True, shared_mode='eval'):
        """Freezes the branches of `domains` and, if `shared`, the shared modules; everything else trains.

        Frozen includes batch-norm statistics and dropout: the modules stay in eval mode whatever `train()`
        says.

        old_bn: relaxes that for the branches of `domains`. 'batch' normalises with batch statistics but
            does not store them; 'released' also overwrites the running statistics, as the published loops
            do.
        dropout: False turns dropout off everywhere.
        shared_mode: 'train' lets batch norms and dropout of frozen shared modules act as in training, as
            published feature extraction does.
        """
        if old_bn not in OLD_BN:
            raise ValueError(f'old_bn {old_bn!r} is not one of {OLD_BN}')
        in_all = {module for outermost in self.shared() for module in outermost.modules()}
        old = {module for domain in domains for module in self.single(domain).modules()} - in_all
        fixed = [p for domain in domains for p in self.branch_parameters(domain)]
        self.requires_grad_(True)
        for parameter in fixed + (self.shared_parameters() if shared else []):
            parameter.requires_grad_(False)
        for norm in batch_norms_of(self.modules()):
            if norm.running_mean is not None:
                norm.track_running_stats = old_bn != 'batch' or norm not in old
        frozen = (in_all if shared and shared_mode == 'eval' else set()) | (old if old_bn == 'frozen' else set())
        if not dropout:
            frozen |= {module for module in self.modules() if isinstance(module, _DropoutNd)}
        self.frozen_modules = tuple(frozen)
        return self

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen_modules:
            module.training = False
        return self

    def synchronise_batch_norms(self):
        """Replaces batch norms by ones with statistics over all processes; shared ones stay shared."""
        made = {norm: nn.SyncBatchNorm.convert_sync_batchnorm(norm) for norm in batch_norms_of(self.modules())}
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if child in made:
                    setattr(module, name, made[child])
        return self

    def view_names(self, domain):
        """({key of a view's tensor: its name in our files} for `domain` alone, the same for what is shared)."""
        view = self.single(domain)
        modules, _ = divide(view, self.domain_bn)
        owners = {f'{name}.{key}': name for name, module in modules.items() for key in module.state_dict()}
        own, shared = {}, {}
        for key in view.state_dict():
            owner = owners.get(key)
            (shared if owner is None else own)[key] = file_key(key, owner, domain)
        return own, shared

    def file_names(self):
        """{tensor's name in this module: its name in our files}; a shared tensor appears once per view."""
        return {f'views.{domain}.{key}': name for domain in range(len(self.views))
                for names in self.view_names(domain) for key, name in names.items()}

    def state_dict(self, *, destination=None, prefix='', keep_vars=False):
        """Every tensor once, under its name in our files (`models.layouts.file_key`)."""
        held = super().state_dict(keep_vars=keep_vars)
        state = OrderedDict() if destination is None else destination
        state.update((prefix + name, held[key]) for key, name in self.file_names().items())
        return state

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Loads a state dict in the form that `state_dict` returns."""
        names = self.file_names()
        surplus = state_dict.keys() - set(names.values())
        views = {key: state_dict[name] for key, name in names.items() if name in state_dict}
        return super().load_state_dict({**views, **{name: state_dict[name] for name in surplus}}, strict, assign)


class PartByPart(nn.Module):
    """Hands the first of n modules the first n-th of a batch, and so on, and joins what they return.

    Arguments may be tensors, or lists and dicts of tensors. The output is one tensor (B, C, ...), with the most
    channels C of any module's, 0 where a module has fewer.
    """

    def __init__(self, modules):
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, *batch):
        found = [module(*part_of(batch, number, len(self.each))) for number, module in enumerate(self.each)]
        most = max(part.shape[1] for part in found)
        return torch.cat([part if part.shape[1] == most else pad(part, (0, 0, 0, 0, 0, most - part.shape[1]))
                          for part in found])


def part_of(batch, number, count):
    """Part `number` of `count` of a tensor (B, ...), or of the tensors in lists and dicts."""
    if isinstance(batch, dict):
        return {name: part_of(value, number, count) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [part_of(value, number, count) for value in batch]
    return batch.unflatten(0, (count, -1))[number] if isinstance(batch, torch.Tensor) else batch


def output_layer_like(layer, num_classes):
    """A freshly initialised convolution like `layer`, transposed or not, but with `num_classes` outputs."""
    names = 'stride', 'padding', 'dilation', 'padding_mode', *(['output_padding'] if layer.transposed else [])
    settings = {name: getattr(layer, name) for name in names}
    fresh = type(layer)(layer.in_channels, num_classes, layer.kernel_size, bias=layer.bias is not None, **settings)
    return fresh.to(layer.weight.device, layer.weight.dtype)


def redraw(modules):
    """Initialises the layers within `modules` anew."""
    for module in modules:
        for layer in module.modules():
            if hasattr(layer, 'reset_parameters'):
                layer.reset_parameters()


def batch_norms_of(modules):
    """All batch norms within `modules`, synchronised ones too, each once."""
    return list(dict.fromkeys(m for module in modules for m in module.modules() if isinstance(m, _BatchNorm)))
