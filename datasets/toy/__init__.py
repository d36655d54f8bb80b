"""Toy roads: drawn street scenes in the layouts of the real data sets."""
