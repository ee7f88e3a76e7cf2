"""Estimates the memory and the time of a training job before it runs."""
