"""Loads, verifies, converts and exports weights. Installed as `keras_effnet.weights`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_effnet.weights.convert import convert_file as convert_file
    from keras_effnet.weights.convert import export as export
    from keras_effnet.weights.convert import load as load
    from keras_effnet.weights.convert import verify as verify
    from keras_effnet.weights.identification import identify as identify

__all__ = ["convert_file", "export", "identify", "load", "verify"]


def __getattr__(name: str):
    if name in __all__:
        from importlib import import_module

        module = "identification" if name == "identify" else "convert"
        return getattr(import_module(f"keras_effnet.weights.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
