"""Tests of handful/cli.py."""
