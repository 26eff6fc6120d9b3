"""Knapsack pruning: the channels of a trained net that stay within a budget, and the smaller net without the others.

Method: arXiv 2002.08258 and its code (yoniaflalo/knapsack_pruning @ 375abf9, external/utils_pruning.py). Three things
differ: the budget is that of the whole net, the cost of a channel includes what the next layers save, and no group
of channels vanishes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
