"""Tests of handful/console.py."""
