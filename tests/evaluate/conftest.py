import pytest

from contrastive.models import DualEncoder


@pytest.fixture
def embedded(monkeypatch):
    """The numbers of images that each call of the image tower embeds."""
    calls = []
    whole = DualEncoder.encode_image

    def counted(self, pixels, *args, **options):
        calls.append(len(pixels))
        return whole(self, pixels, *args, **options)

    monkeypatch.setattr(DualEncoder, "encode_image", counted)
    return calls
