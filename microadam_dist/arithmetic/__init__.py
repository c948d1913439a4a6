"""One MicroAdam step in torch, the definition every kernel is compared with, and the tensors it works on.

`step` is the algorithm, `error_feedback` and `window` are how what it keeps is stored, `blocks` the views it gets.
"""
