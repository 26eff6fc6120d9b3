"""`python -m keras_effnet`: the command `keras-effnet`."""

from keras_effnet.commands import program

program()
