"""Tests of openm1.data."""
