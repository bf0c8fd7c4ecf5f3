"""What the commands do: one file each, which parses the command line, calls, and prints.

The scripts of a clone (``python train.py``) and ``lightning_gpt.__main__`` call them.
"""
