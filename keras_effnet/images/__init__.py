"""Photos: decoding, cropping and resizing as the weights expect, folders of photos, and class names."""
