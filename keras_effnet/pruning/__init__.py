"""Knapsack pruning: keeps the most important channels of a trained network within a budget and removes the others.

Method: arXiv 2002.08258 and its code (yoniaflalo/knapsack_pruning @ 375abf9, external/utils_pruning.py). Three
differences: the budget covers the whole network, the cost of a channel includes the savings in the next layers, and
every group keeps at least one channel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
