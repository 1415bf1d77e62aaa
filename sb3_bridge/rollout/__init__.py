"""Rollouts behind SB3's callbacks: on the device for gymnax, on the host for every other VecEnv."""
