"""gymnax's environments behind the interfaces of SB3 and Gymnasium."""
