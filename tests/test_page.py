import base64
import io
import re

import pytest
from jinja2 import UndefinedError
from PIL import Image

from contrastive.page import data_uri, filled, html_page


def test_titles_are_escaped_and_bodies_are_not():
    page = html_page("<a>", "1 < 2", "<p>body</p>", "charts.css", "charts.js")
    assert "<title>&lt;a&gt;</title>" in page and "<h1>&lt;a&gt;</h1><p>1 &lt; 2</p>" in page
    assert "<p>body</p>" in page
    assert page.index(":root {") < page.index(".chart {") < page.index("</style>") < page.index("<body>")
    assert page.index("</main>") < page.index("<script>") < page.index("pointermove") < page.index("</script>")


def test_a_page_without_a_script_has_none_and_nothing_is_fetched():
    page = html_page("a", "", "b")
    assert "<script" not in page and not re.search(r"(src|href)=|@import|https?://", page)


def test_a_picture_comes_back_from_its_uri():
    image = Image.new("RGB", (3, 2), (10, 200, 30))
    head, _, data = data_uri(image).partition(",")
    assert head == "data:image/png;base64"
    again = Image.open(io.BytesIO(base64.b64decode(data)))
    assert again.size == (3, 2) and again.getpixel((2, 1)) == (10, 200, 30)
    assert data_uri(b"abc", "JPEG") == "data:image/jpeg;base64,YWJj"


def test_a_template_of_a_page_escapes_and_every_field_is_asked_for(tmp_path):
    for name, expected in (("a.html.jinja", "&lt;b&gt; &amp;\n"), ("a.md.jinja", "<b> &\n")):
        (tmp_path / name).write_text("{% if True %}\n{{ text }}\n{% endif %}\n")
        assert filled(tmp_path / name, text="<b> &") == expected
        with pytest.raises(UndefinedError, match="'text' is undefined"):
            filled(tmp_path / name)
