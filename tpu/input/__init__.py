"""The input pipeline: where examples come from, decoding, cropping, augmentation, batches."""
