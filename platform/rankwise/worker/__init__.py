"""Loops that claim jobs and execute them."""
