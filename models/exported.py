"""A view as a file that runs without this project: ONNX, torch.export or OpenVINO, with its metadata inside.

The network in the file takes images (B, 3, H, W), floats in [0, 1], RGB, and returns logits
(B, classes, H, W) with void as the last class. B, H and W are free; H and W must be multiples of 8.
"""
import importlib
import io
import json
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export import Dim

from mdil.utils.errors import UserError, brief
from mdil.utils.files import move, write_atomically
from mdil.utils.parser import SIDE

NAME = 'mdil'       # the key of the metadata, JSON
PACKAGES = {'onnx': ('onnx', 'onnxscript', 'onnxruntime'), 'torch': (), 'openvino': ('openvino',)}
SUFFIXES = {'.onnx': 'onnx', '.pt2': 'torch', '.xml': 'openvino'}


def needed(*packages):
    """The modules of these names; UserError that says how to install them if one is missing."""
    try:
        return [importlib.import_module(name) for name in packages]
    except ImportError:
        raise UserError(f'exported networks of this format need {" and ".join(packages)}: pip install '
                        f'{" ".join(packages)}') from None


def free_sides():
    """The free dimensions of the images, the network's one argument, for torch.export."""
    return ({0: Dim('batch', min=1), 2: SIDE * Dim('h', min=2), 3: SIDE * Dim('w', min=2)},)


def write_onnx(network, example, path, about):
    needed(*PACKAGES['onnx'])
    program = torch.onnx.export(network, (example,), dynamo=True, dynamic_shapes=free_sides(), verbose=False,
                                input_names=['images'], output_names=['logits'])
    model = program.model_proto
    model.metadata_props.add(key=NAME, value=json.dumps(about))
    write_atomically(path, lambda file: file.write(model.SerializeToString()))


def write_torch(network, example, path, about):
    program = torch.export.export(network, (example,), dynamic_shapes=free_sides())
    held = io.BytesIO()
    torch.export.save(program, held, extra_files={NAME: json.dumps(about)})
    write_atomically(path, lambda file: file.write(held.getvalue()))


def openvino_model(network, example):
    """The network as an OpenVINO model."""
    openvino, = needed('openvino')
    with warnings.catch_warnings():     # from torch.jit.trace, with which OpenVINO reads networks
        warnings.simplefilter('ignore')
        return openvino.convert_model(network, example_input=example, input=[openvino.PartialShape([-1, 3, -1, -1])])


def write_openvino(network, example, path, about, quantise=lambda model: model):
    """Writes OpenVINO's pair of files, `path` (.xml) and the same name with .bin; quantise: changes the model first."""
    openvino, = needed('openvino')
    model = quantise(openvino_model(network, example))
    model.set_rt_info(json.dumps(about), [NAME])
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        made = Path(folder) / Path(path).name
        openvino.save_model(model, made, compress_to_fp16=False)
        for suffix in ('.bin', '.xml'):     # last the .xml, the one that users name
            move(made.with_suffix(suffix), Path(path).with_suffix(suffix))


WRITERS = {'onnx': write_onnx, 'torch': write_torch, 'openvino': write_openvino}


def read_onnx(path):
    runtime, = needed('onnxruntime')
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    about = session.get_modelmeta().custom_metadata_map.get(NAME)
    return about, lambda images: session.run(None, {session.get_inputs()[0].name: images})[0]


def read_torch(path):
    held = {NAME: ''}
    module = torch.export.load(path, extra_files=held).module()
    return held[NAME], lambda images: module(torch.from_numpy(images)).detach().numpy()


def read_openvino(path):
    openvino, = needed('openvino')
    model = openvino.Core().read_model(path)
    about = model.get_rt_info([NAME]).value if model.has_rt_info([NAME]) else None
    # On processors with bf16, OpenVINO computes in bf16 unless told otherwise.
    settings = {'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = openvino.compile_model(model, 'CPU', settings)
    return about, lambda images: compiled(np.ascontiguousarray(images))[0]


READERS = {'onnx': read_onnx, 'torch': read_torch, 'openvino': read_openvino}


def is_exported(path):
    """Whether a file's name says that it is an exported network."""
    return Path(path).suffix.lower() in SUFFIXES


class Exported(nn.Module):
    """An exported network, on the CPU in float32. about: its metadata, see `evaluation.export.about`."""

    def __init__(self, path):
        super().__init__()
        if not os.path.isfile(path):
            raise UserError(f'{path} does not exist')
        kind = SUFFIXES[Path(path).suffix.lower()]
        needed(*PACKAGES[kind][-1:])
        try:
            about, self.run = READERS[kind](str(path))
            self.about = json.loads(about)
        except Exception as error:      # a runtime may raise anything on a file that is not its own
            raise UserError(f'{path} cannot be read as a network of `python -m mdil export` '
                            f'({brief(error)})') from None

    def forward(self, images, domain=0):
        """Logits (B, classes, H, W) of images (B, 3, H, W), floats in [0, 1]."""
        return torch.from_numpy(np.array(self.run(images.contiguous().numpy())))
