"""The benchmarks that the README and the docs quote; each prints its target beside what it measured."""
