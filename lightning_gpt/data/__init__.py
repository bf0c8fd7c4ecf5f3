"""Training data: text/ finds text, tokens/ turns it into token files, streams.py orders samples, loading.py feeds them.

tasks/ generates samples in place of text. Imports run from loading.py to tasks/, streams.py, tokens/ and text/.
"""
