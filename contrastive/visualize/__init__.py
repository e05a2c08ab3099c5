"""Pictures of what an image tower sees. Functions that compute return tensors; functions that draw return figures.

A figure is a matplotlib one; `pictures.make_pictures` makes all of them, `pictures_page.write_page` a folder with them.
"""
