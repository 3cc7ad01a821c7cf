"""What a GPU has to compile for a model, compiled by other processes while this one reads the weights.

MLX compiles CUDA kernels when they are first launched, each of its modules for a second or several, one after the
other, and keeps them in a folder. So processes do a share each of what start-up will do, on a miniature of the model
(miniature.py): the same layers, few of them. What they compiled lies in the folder when the server's own start-up asks.
"""
