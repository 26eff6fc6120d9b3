"""Over HTTP: the service of `keras-effnet serve`, and the page of `keras-effnet demo`."""
