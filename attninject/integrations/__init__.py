"""Blocks kept through the trainers and the files of other libraries.

No module here imports the library that it serves, nor patches it: it works on what a user passes in, and asks for no
more than the methods that it names.
"""
