"""Deployment: `Predictor`, exports, batch-norm folding, int8 quantization, speed measurements."""
