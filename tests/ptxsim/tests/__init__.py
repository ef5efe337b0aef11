"""Tests of the simulator itself; a package, so that its conftest is not the one of ``tests/``."""
