"""Tests of the model. `reference` is a second, independent implementation to test against."""
