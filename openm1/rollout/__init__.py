"""A task played against a policy; under both reinforcement learning and evaluation.

Reading order: run.
"""
