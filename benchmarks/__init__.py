"""Benchmarks: one runnable module per question, a table and JSON from each."""
