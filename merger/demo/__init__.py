"""The demo that the package carries: tiny models, their tasks, and a comparison of merges."""
