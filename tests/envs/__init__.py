"""Tests of openm1.envs; judges.py holds judges whose verdicts are a function."""
