"""The command with a net of three blocks: `python tests/mini.py train --model.name efficientnet-mini`.

The net starts in a fifth of Lite0's time and has all parts of B0: expansion, squeeze-and-excite, drop connect.
"""

import os
from dataclasses import replace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_effnet.commands import program
from keras_effnet.nets.variants import B0_STAGES, VARIANTS

STAGES = tuple(replace(stage, repeats=1) for stage in B0_STAGES[:3])
VARIANTS["efficientnet-mini"] = replace(VARIANTS["efficientnet-b0"], name="efficientnet-mini", stages=STAGES)

if __name__ == "__main__":
    program()
