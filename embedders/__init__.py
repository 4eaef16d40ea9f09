"""Image bytes to vectors: decoding, preprocessing and the models."""
