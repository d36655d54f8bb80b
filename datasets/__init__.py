"""Domains, data sets and their loading."""
from mdil.datasets.declaration import Domain
from mdil.datasets.domains import DOMAINS, get_domain
from mdil.datasets.segmentation import SegmentationDataset

__all__ = ['DOMAINS', 'Domain', 'SegmentationDataset', 'get_domain']
