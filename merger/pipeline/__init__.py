"""Stages and their registry, parameters and passes over the data; knows no files."""
