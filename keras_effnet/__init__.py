"""EfficientNets in Keras 3: B0-B8, L2, Lite and EdgeTPU, with their published weights.

The public names stand in `__init__.pyi`. Each is resolved when it is first used (PEP 562), so that a command that needs
no Keras starts without it.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
