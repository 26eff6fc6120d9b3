"""The HTTP service: `keras-effnet serve`."""
