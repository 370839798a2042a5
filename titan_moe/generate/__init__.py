"""Text from a trained model: key-value cache, sampling, and the loop over new tokens."""
