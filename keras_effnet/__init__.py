"""EfficientNets in Keras 3: B0-B8, L2, Lite, EdgeTPU, CondConv and pruned nets, with their published weights.

The public names stand in `__init__.pyi`. Each is resolved when it is first used (PEP 562), so that a command that needs
no Keras starts without it.
"""

from importlib import import_module

import lazy_loader
from wrapt import when_imported

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@when_imported("keras")
def _register(_) -> None:
    """Makes Keras know the layers of saved models: it finds only what is registered, and imports nothing for it."""
    import_module("keras_effnet.nets.condconv")
