"""From recipe and headers to a plan: what happens to every tensor."""
