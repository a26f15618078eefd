"""Tests of openm1.evals."""
