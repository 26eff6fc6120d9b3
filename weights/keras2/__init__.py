"""Models that Keras 2 (tf.keras, TensorFlow 2.0 to 2.15) has saved: read without it, and rebuilt in Keras 3."""
