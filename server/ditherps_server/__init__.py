"""The ditherps server: holds the model, plans rounds, decodes and sums what workers send."""
