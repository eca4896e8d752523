"""Plans a merge from recipe and headers: the operation on every tensor."""
