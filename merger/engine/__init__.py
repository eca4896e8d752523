"""Carries a plan out: reads slices, runs the stages and writes the merged checkpoint."""
