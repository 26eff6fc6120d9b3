"""`python -m keras_effnet`: the command `keras-effnet`."""

from keras_effnet.commands import main

main(prog_name="keras-effnet")
