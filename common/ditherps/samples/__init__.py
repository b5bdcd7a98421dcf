"""Mode `data`: quantized samples instead of gradients (Hanna et al., arXiv 2012.07913)."""
