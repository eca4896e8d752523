"""Checkpoints: reading them from folders and the Hub, whatever their format, and writing one."""
