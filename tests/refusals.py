"""What every refusal of a data source has to look like."""

import pytest

from contrastive.data.sources import open_source
from contrastive.errors import UserError


def refused(spec, match, **options):
    """`spec` is refused with one line that matches."""
    with pytest.raises(UserError, match=match) as caught:
        open_source(str(spec), **options)
    assert "\n" not in str(caught.value)
