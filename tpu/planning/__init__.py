"""The TPU planner: asks the TPU compiler for the memory and the traffic of a step, without a TPU."""
