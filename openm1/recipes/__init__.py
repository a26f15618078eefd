"""Whole trainings as Python values.

Reading order: vocabulary, runs (one stage of training), chain (the demo's model), nano (the shipped
model), demo.
"""
