"""Speed and memory of the library beside PyTorch, google-tunix and matrix products alone."""
