"""Recipes for `gramlip train`, on Lightning: the paper's ResNet-18 and small networks that a CPU trains in minutes.

Needs the extra `train`: nothing else in gramlip imports this package.
"""
