"""TFDS builders (array_record, no TensorFlow)."""
