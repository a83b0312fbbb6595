"""Benchmarks: speed as ratios, to the memory floor and to what a user would pick instead."""
