"""Images per second of one core: the published way of loading, ours without and with a cache.

    python -m benchmarks.loading [--height 512 --images 24 --rounds 7 --json FILE]

draws its own images in the sizes of three data sets, then takes the routes in turn, round by
round. Every route ends in a batch of flipped and shifted samples. Those named 'float' convert it
as the published way does, to float images and int64 labels; the others hand over uint8, which
training converts on its device, and the last also leaves flip and shift to the device. Files are
in memory when read: what a disk costs is not in the figures.
"""
import random
import resource
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import default_collate

from datasets.cache import cached
from datasets.domains import DOMAINS
from datasets.loading import TrainBatches, make_loader
from datasets.segmentation import SegmentationDataset
from datasets.toy_roads import draw_scene, label_image, save, encoded, scene_paths
from utils.errors import run_main
from utils.options import Parser, positive, side, size_options
from utils.records import environment, write_json
from utils.tables import plain
from utils.task import to_float

BATCH = 6
# What is measured: name, domain whose layout the files have, their size, quality of JPEG.
SOURCES = [('2048x1024 PNG', 'cityscapes', (2048, 1024), None), ('1280x720 JPEG', 'BDD', (1280, 720), 75),
           ('320x227 JPEG', 'BDD', (320, 227), 92)]
