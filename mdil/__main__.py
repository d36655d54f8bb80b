"""Runs a tool of the project: `python -m mdil` lists them, `python -m mdil TOOL ...` runs one."""
import importlib
import sys
from functools import partial

from mdil.utils.errors import UserError, run_main

# Tool: (module with a `main(argv)`, what it does).
TOOLS = {
    'train': ('mdil.train', 'learn one step of a sequence of domains'),
    'eval': ('mdil.eval', 'evaluate checkpoints on the validation images of their domains'),
    'predict': ('mdil.predict', 'segment images, folders and videos'),
    'check': ('mdil.datasets.check', 'check that domains are fit to train on'),
    'create-labels': ('mdil.datasets.create_labels', 'make the label images of IDD and Cityscapes'),
    'class-weights': ('mdil.datasets.class_weights', 'compute the cross-entropy weights of domains'),
    'toy-roads': ('mdil.datasets.toy.roads', 'write toy road scenes of three countries'),
    'compare': ('mdil.evaluation.compare', 'compare evaluated sequences: tables and a picture'),
    'report': ('mdil.evaluation.report', 'write an HTML report about a sequence'),
    'tsne': ('mdil.evaluation.tsne', 'show encoder features before and after a step'),
    'describe': ('mdil.evaluation.describe', 'print the model card of a checkpoint'),
    'branches': ('mdil.evaluation.branches', 'extract domains from checkpoints as files, and join them'),
    'verify': ('mdil.evaluation.verify', 'check that a step left the old domains unchanged'),
    'repair': ('mdil.evaluation.repair', 'restore what later steps changed in old domains'),
    'identify': ('mdil.evaluation.identify', 'add to a checkpoint what --domain auto needs'),
    'export': ('mdil.evaluation.export', 'export a domain to ONNX, torch.export or OpenVINO, or all as published'),
    'torchrun': ('mdil.utils.launch', 'start several processes of train.py or eval.py, each on its own GPU'),
}


def run(arguments):
    """Runs the tool named by the first of `arguments` and returns its exit status.

    Without arguments, lists the tools. UserError for an unknown tool.
    """
    if not arguments or arguments[0] in ('-h', '--help'):
        width = max(map(len, TOOLS))
        print('python -m mdil TOOL [--help | OPTIONS]\n',
              *(f'  {name:<{width}}  {about}' for name, (_, about) in TOOLS.items()), sep='\n')
        return 0
    name, *rest = arguments
    if name not in TOOLS:
        raise UserError(f'{name!r} is not a tool; choose from {", ".join(TOOLS)}')
    return importlib.import_module(TOOLS[name][0]).main(rest)


def main():
    """The command `mdil`."""
    run_main(partial(run, sys.argv[1:]))


if __name__ == '__main__':
    main()
