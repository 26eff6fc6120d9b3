"""Training on Cloud TPUs, GPUs and laptops. Installed as `keras_effnet.tpu`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["recipes"], submod_attrs={"config": ["Recipe", "override"]}
)
