"""Copies of Gymnasium environments in which candidates are followed."""
