"""Models and policies in SB3's zip, without pickle."""
