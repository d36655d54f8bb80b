"""Domains, data sets and their loading."""
from datasets.domains import DOMAINS, Domain, get_domain
from datasets.segmentation import SegmentationDataset

__all__ = ['DOMAINS', 'Domain', 'SegmentationDataset', 'get_domain']
