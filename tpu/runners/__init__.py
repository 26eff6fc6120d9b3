"""What moves arrays to devices: the runners on TensorFlow and on JAX, and the kernels of the latter."""
