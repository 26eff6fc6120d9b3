"""Training on Cloud TPU, GPUs and laptops. Installed as `keras_effnet.tpu`."""
