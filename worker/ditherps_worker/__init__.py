"""The ditherps worker: holds data, computes updates, encodes and sends them."""
