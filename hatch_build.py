"""Build hook: in a checkout the code lies next to the folder mdil; in the wheel it goes inside it."""
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

INSIDE = ('models', 'losses', 'datasets', 'training', 'evaluation', 'utils', 'train.py', 'eval.py', 'predict.py')


class Inside(BuildHookInterface):
    """Puts the folders and scripts into the package; an editable installation uses them in place."""

    def initialize(self, version, build_data):
        if version != 'editable':
            build_data['force_include'] |= {name: f'mdil/{name}' for name in INSIDE}
