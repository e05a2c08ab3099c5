"""Class names of a set or file, joined to what data call their classes."""

from contrastive.data.class_joining import join, load_class_set


def load_class_names(name_or_file, own_names=None):
    return join(load_class_set(name_or_file), own_names)[0]
