"""From YAML to a checked recipe, with a place for every fault."""
