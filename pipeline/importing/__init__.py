"""Imports of foreign recordings into sessions."""
