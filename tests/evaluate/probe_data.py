"""Labelled features for the tests of the probes."""

import torch
import torch.nn.functional as F


def clouds(num, width=16, num_classes=3, seed=0, spread=1.0, dtype=torch.float64):
    """(num, width) features around class means, off centre and of uneven spread, every class there; their labels."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    means = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    # The first class has about half of all samples.
    labels = (torch.randint(2 * num_classes, (num,), generator=generator) - num_classes).clamp(min=0)
    labels[:num_classes] = torch.arange(num_classes)
    scales = torch.linspace(1, 0.05, width, dtype=torch.float64)
    return (scales * (means[labels] + spread * noise(num, width)) + 2).to(dtype), labels


def unit(features):
    return F.normalize(features, dim=1)


def fitted(kind, given, **options):
    """What a probe of that kind finds, its options checked as those in a suite's file are."""
    task = kind("train", "test", **options)
    task.check()
    return task.fit(given)
