"""The arithmetic of a training step as pure functions: loss, optimizers, schedules and moving average."""
