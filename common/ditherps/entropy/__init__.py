"""The entropy coder's models: a shipped family of distributions, and how a tile's parameters choose among them."""
