"""Tests of openm1.recipes."""
