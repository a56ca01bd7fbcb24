"""Floating-point facts and proofs about matrices; knows no layer."""
