"""EfficientNets in Keras 3: V1, V2, L2, Lite, EdgeTPU, CondConv, X, H and pruned nets, with their published weights.

`__init__.pyi` lists the public names. Each is imported on first use (PEP 562), so a command that needs no Keras starts
without it.
"""

import os
from importlib import import_module

import lazy_loader
from wrapt import when_imported

__version__ = "0.1.0"

# ONNX Runtime 1.29 and later sends data about models to its maker, and asks nobody. Set to 0, it does so here too.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@when_imported("keras")
def _register(_) -> None:
    """Registers the layers of saved models. Keras finds only registered layers, and imports nothing to find them."""
    import_module("keras_effnet.nets.condconv")
