"""Pictures of what an image tower sees. Functions that compute return tensors; functions that draw return figures.

A figure is a matplotlib one; `pictures.make_picture` makes each, `pictures.write_page` a folder with them.
"""
