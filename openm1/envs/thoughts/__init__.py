"""Worked thoughts, written for a very small model: short local steps, the same words every time.

Each character follows from a few others that stand close by or at a fixed distance, so that no step
asks for more than copying, a digit fact or counting by one.
"""
