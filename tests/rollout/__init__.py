"""Tests of openm1.rollout."""
