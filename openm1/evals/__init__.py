"""Measuring a policy on held-out tasks: a rollout without the gradient.

Reading order: metrics, run, report.
"""
