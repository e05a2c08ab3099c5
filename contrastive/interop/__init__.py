"""Models in and out of folders: our own format and other libraries'.

`contrastive.interop.loading` reads any of them, `bundle` holds what was read and writes our own, `export` writes for
others. Nothing is imported here: training needs our own folder alone.
"""
