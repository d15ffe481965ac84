"""Measures of generated video: the toy world's exact laws and the length law."""
