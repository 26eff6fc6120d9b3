"""Where weights come from and how they become ours. Installed as `keras_effnet.weights`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_effnet.weights.convert import load as load

__all__ = ["load"]


def __getattr__(name: str):
    if name == "load":
        from keras_effnet.weights.convert import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
