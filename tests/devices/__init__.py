"""Tests that need real kernel devices: a V4L2 camera (vivid) and a sound card that hears itself (snd-aloop)."""
