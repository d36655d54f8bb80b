"""Encoder features of labelled pixels: computing, sampling and comparing them.

Linear CKA: Kornblith et al., "Similarity of Neural Network Representations Revisited",
ICML 2019. Silhouette: Rousseeuw, 1987, as in scikit-learn.
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from mdil.datasets.segmentation import open_label, to_classes
from mdil.utils.precision import to_float

CELL = 8        # side, in image pixels, of the square that one feature vector covers


@torch.inference_mode()
def encode(model, number, image, device='cpu'):
    """Encoder features (H/8 * W/8, D), float32 numpy, of an image (3, H, W) uint8 in the branch `number`.

    These are the inputs of the head; of several scales, the last. D is 128 for ERFNet. Features of
    another resolution are resampled to H/8 x W/8.
    """
    view, kept = model.eval().single(number), []
    hook = view.get_submodule(view.heads[0]).register_forward_pre_hook(lambda head, inputs: kept.append(inputs[0]))
    view(to_float(image[None].to(device)))
    hook.remove()
    features, = kept
    while not isinstance(features, torch.Tensor):
        features = list(features.values() if isinstance(features, dict) else features)[-1]
    cells = tuple(side // CELL for side in image.shape[1:])
    if features.shape[2:] != cells:
        features = F.interpolate(features, cells, mode='bilinear', align_corners=False)
    return features[0].flatten(1).T.float().cpu().numpy()


def cell_classes(label, num_classes):
    """The most frequent class in each cell of 8 x 8 label pixels (H, W): numpy (H/8, W/8); the lower one in a tie."""
    shares = F.avg_pool2d(F.one_hot(label.long(), num_classes).permute(2, 0, 1)[None].float(), CELL)
    return shares[0].argmax(dim=0).numpy()


def label_of(dataset, index):
    """Label (H, W) uint8 of an image of `dataset`; the image itself is not read."""
    pair = dataset.pairs[index]
    label = open_label(pair).resize(dataset.size[::-1], Image.NEAREST)
    return torch.from_numpy(to_classes(np.asarray(label), pair))


def richest_images(dataset, count):
    """Indices of the `count` images whose cells have the most classes (void excluded), most first."""
    kinds = []
    for index in tqdm(range(len(dataset)), desc=f'classes of {dataset.domain.name}', leave=False, disable=None):
        present = np.unique(cell_classes(label_of(dataset, index), dataset.domain.num_classes))
        kinds.append(len(set(present.tolist()) - {dataset.domain.void}))
    return [int(index) for index in np.argsort(-np.array(kinds), kind='stable')[:count]]


def sample_per_class(classes, most, void, random):
    """Sorted indices of at most `most` entries of each class in `classes` (N,), without void.

    random: a numpy Generator, which draws the entries of classes that have more.
    """
    members = [np.flatnonzero(classes == kind) for kind in np.unique(classes) if kind != void]
    drawn = [random.permutation(indices)[:most] for indices in members]
    return np.sort(np.concatenate(drawn)) if drawn else np.empty(0, dtype=int)


def linear_cka(first, second):
    """Linear CKA in [0, 1] of features (N, D) and (N, E) of the same N pixels; 1: equal up to rotation and scale.

    NaN if the features of either are constant.
    """
    first, second = (np.asarray(features, dtype=np.float64) - np.mean(features, axis=0, dtype=np.float64)
                     for features in (first, second))
    shared = np.linalg.norm(first.T @ second) ** 2
    own = np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)
    return float(shared / own) if own else float('nan')


def mean_cosine(first, second):
    """Mean over N pixels of the cosine in [-1, 1] between their two feature vectors (N, D); 1: same directions."""
    first, second = (np.asarray(features, dtype=np.float64) for features in (first, second))
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(np.mean((first * second).sum(axis=1) / np.maximum(lengths, 1e-12)))


def silhouette(features, classes):
    """Mean silhouette in [-1, 1] of features (N, D) grouped by classes (N,): 1 separate, 0 touching, negative mixed.

    NaN with fewer than two classes, or with no class that has two pixels.
    """
    from sklearn.metrics import silhouette_score
    return float(silhouette_score(features, classes)) if 1 < len(np.unique(classes)) < len(classes) else float('nan')
